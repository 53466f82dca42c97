"""What loading a stage reads and holds, and what the fingerprint of a checkpoint costs.

Writes a checkpoint of random bytes with the geometry of FLUX.2 Klein 9B (width 4096) and fewer blocks, as a sharded
folder and as a single file in the naming of Black Forest Labs, and loads spans of it, each in a process of its own.
Targets: at most 2 % more bytes read than the stage has, and a peak of host memory of at most the stage and 512 MB.
Ratios are what counts; seconds depend on the disk.

    python -m benchmarks.stage_loading [--doubles 2] [--singles 6] [--folder DIR] [--save DIR] [--label TEXT]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import psutil

WIDTH = 4096
SHARDS = 3
ALLOWED_READ = 1.02
ALLOWED_MEMORY = 512 << 20
_BLOCK = 32 << 20

Shapes = Mapping[str, tuple[int, ...]]


def geometry(doubles: int, singles: int) -> tuple[dict[str, Any], Shapes]:
    """Configuration, and the parameters' shapes by their names in diffusers."""
    import torch
    from diffusers import Flux2Transformer2DModel

    config = {
        "num_layers": doubles,
        "num_single_layers": singles,
        "num_attention_heads": WIDTH // 128,
        "joint_attention_dim": 3 * WIDTH,
        "guidance_embeds": False,
    }
    with torch.device("meta"):
        model = Flux2Transformer2DModel(**config)
    return config, {name: tuple(p.shape) for name, p in model.named_parameters()}


def original(shapes: Shapes) -> Shapes:
    """The same weights in the naming of Black Forest Labs, where query, key and value are one tensor."""
    from mesh_flux2.layout import pieces_of

    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        for piece in pieces_of(name, shape[0], {}, "", True):
            rows = max(piece.stop or shape[0], found.get(piece.tensor, (0,))[0])
            found[piece.tensor] = (rows, *shape[1:])
    return found


def write(path: Path, shapes: Shapes) -> None:
    """A bfloat16 safetensors file of random bytes; holds one block of them in memory."""
    noise = np.random.default_rng(len(shapes)).bytes(_BLOCK)
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    header: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + sizes[name]]}
        position += sizes[name]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, position, _BLOCK):
            file.write(noise[: min(_BLOCK, position - start)])


def write_folder(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    folder.mkdir()
    named = {"_class_name": "Flux2Transformer2DModel", **config}
    (folder / "config.json").write_text(json.dumps(named), encoding="utf-8")
    names = list(shapes)
    where = {}
    for shard in range(SHARDS):
        part = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        file = f"diffusion_pytorch_model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        write(folder / file, {name: shapes[name] for name in part})
        where |= dict.fromkeys(part, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}), encoding="utf-8")


def load_span(path: Path, span: str) -> dict[str, Any]:
    """In a fresh process: load one stage on the CPU, and say what it took."""
    import torch

    from mesh_core.builtin import load_plugins
    from mesh_core.model.checkpoint import read_header
    from mesh_core.model.library import recognise
    from mesh_core.model.sizes import span_bytes
    from mesh_core.model.weights import WeightReader

    checkpoint = recognise(read_header(path), load_plugins())
    reader = WeightReader(checkpoint.header)
    where = checkpoint.spec.span(span)
    before, read = psutil.Process().memory_info().rss, _bytes_read()
    began = perf_counter()
    stage = checkpoint.adapter.build_stage(checkpoint.spec, where, reader, device="cpu", dtype=torch.bfloat16)
    seconds = perf_counter() - began
    assert sum(1 for _ in stage.block_modules()) == len(where)
    from_system = _bytes_read()
    return {
        "span": span,
        "stage_bytes": span_bytes(checkpoint.spec, where),
        "read_bytes": reader.bytes_read if from_system is None or read is None else from_system - read,
        "peak_growth": _peak() - before,
        "process_peak": _peak(),
        "seconds": seconds,
    }


def _bytes_read() -> int | None:
    """Bytes that the process has asked the system to read, from disk or its cache; None where it does not count."""
    counters = getattr(psutil.Process(), "io_counters", None)
    if counters is None:
        return None
    found = counters()
    return int(getattr(found, "read_chars", found.read_bytes))


def _peak() -> int:
    """Bytes of memory that the process held at most."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def fingerprint_cost(path: Path) -> dict[str, Any]:
    """In a fresh process: seconds for the fingerprint from the disk, from the system's cache, and remembered."""
    from mesh_core.builtin import load_plugins
    from mesh_core.model.checkpoint import read_header
    from mesh_core.model.library import recognise

    checkpoint = recognise(read_header(path), load_plugins())
    size = sum(t.nbytes for t in checkpoint.header.tensors.values())
    found: dict[str, Any] = {"bytes": size}
    with TemporaryDirectory() as folder:
        if _forget_cached(checkpoint.header.files):
            found["cold"] = _timed(Path(folder) / "cold", checkpoint)
        found["warm"] = _timed(Path(folder) / "warm", checkpoint)
        found["remembered"] = _timed(Path(folder) / "warm", checkpoint)
    return found


def _timed(home: Path, checkpoint: Any) -> float:
    """Seconds for the fingerprint with what is remembered under ``home``."""
    from mesh_core.model import fingerprint

    os.environ["MESH_HOME"] = str(home)
    began = perf_counter()
    fingerprint.of_checkpoint(checkpoint.header, checkpoint.spec)
    return perf_counter() - began


def _forget_cached(files: tuple[Path, ...]) -> bool:
    """Have the system drop its cache of ``files``; false where it cannot be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def in_child(*arguments: str, home: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    environment = {**os.environ, "MESH_HOME": str(home)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def lines(layout: str, results: list[dict[str, Any]], cost: dict[str, Any]) -> Iterator[str]:
    """The results of one layout as text."""
    yield f"{layout}, {cost['bytes'] / 1e9:.2f} GB"
    yield (
        f"{'span':>6}{'stage MB':>10}{'read MB':>10}{'ratio':>8}{'peak MB':>9}{'over stage':>12}"
        f"{'process MB':>12}{'s':>7}"
    )
    for r in results:
        yield (
            f"{r['span']:>6}{r['stage_bytes'] / 1e6:10.1f}{r['read_bytes'] / 1e6:10.1f}"
            f"{r['read_bytes'] / r['stage_bytes']:8.4f}{r['peak_growth'] / 1e6:9.1f}"
            f"{(r['peak_growth'] - r['stage_bytes']) / 1e6:12.1f}{r['process_peak'] / 1e6:12.1f}{r['seconds']:7.1f}"
        )
    for name in ("cold", "warm"):
        if name in cost:
            rate = cost["bytes"] / cost[name]
            speed = f"{cost[name]:.1f} s, {rate / 1e9:.2f} GB/s"
            yield f"fingerprint, {name}: {speed}; 20 GB would take {2e10 / rate:.0f} s"
    yield f"fingerprint, remembered: {cost['remembered'] * 1e3:.1f} ms"


def verdict(results: list[dict[str, Any]]) -> str:
    read = max(r["read_bytes"] / r["stage_bytes"] for r in results)
    memory = max(r["peak_growth"] - r["stage_bytes"] for r in results)
    met = read <= ALLOWED_READ and memory <= ALLOWED_MEMORY
    return (
        f"{'met' if met else 'MISSED'}: at most {read:.4f} of the stage's size read (target {ALLOWED_READ}), at most "
        f"{memory / 1e6:.0f} MB above it in memory (target {ALLOWED_MEMORY / 1e6:.0f})"
    )


NOTE = """\
read: all bytes that the process asked the system for while it loaded. peak: growth of resident memory while loading;
process: peak of the whole process, Python, torch and diffusers included. The fingerprint hashes every byte of every
weight (BLAKE3), once per file: it is remembered by path, size and modification time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--doubles", type=int, default=2)
    parser.add_argument("--singles", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints are written for a while")
    parser.add_argument("--save", type=Path, default=None)
    parser.add_argument("--label", default="")
    parser.add_argument("--load", nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--fingerprint", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load_span(Path(options.load[0]), options.load[1])))
    elif options.fingerprint:
        print(json.dumps(fingerprint_cost(Path(options.fingerprint))))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    from mesh_core.bench.report import save

    blocks = options.doubles + options.singles
    spans = [":", f":{blocks // 2}", f"{blocks // 2}:", "1:2", f"{blocks - 2}:{blocks - 1}"]
    config, shapes = geometry(options.doubles, options.singles)
    text: list[str] = []
    data: dict[str, Any] = {}
    everything: list[dict[str, Any]] = []
    for layout in ("sharded folder", "single file"):
        with TemporaryDirectory(dir=options.folder) as scratch:
            path = Path(scratch) / ("model" if layout == "sharded folder" else "model.safetensors")
            home = Path(scratch) / "home"
            if layout == "sharded folder":
                write_folder(path, config, shapes)
            else:
                write(path, original(shapes))
            results = [in_child("--load", str(path), span, home=home) for span in spans]
            cost = in_child("--fingerprint", str(path), home=home)
        data[layout] = {"stages": results, "fingerprint": cost}
        everything += results
        part = [*lines(layout, results, cost), ""]
        print("\n".join(part), flush=True)
        text += part
    print(verdict(everything))
    if options.save is not None:
        for saved in save(
            options.save, "stage-loading", options.label, data, "\n".join([*text, verdict(everything), "", NOTE])
        ):
            print(f"saved {saved}")


if __name__ == "__main__":
    main()
