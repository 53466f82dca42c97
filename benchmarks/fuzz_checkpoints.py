"""Damage files of quantised models: each is refused by a CheckpointError, or is a model whose stage can be built.

A file in every format of `benchmarks.quantise` is damaged in what it says of tensors, in its markers, metadata and
content (`benchmarks.damaged_checkpoints`). Then its header is read and recognised, and a stage of all blocks is built.
That must end within a second of processor time, in memory of no more than the file's size and 64 MB; a stage must hold
as many bytes as the header promised, and numbers of the shape that it says. The first failure at each
place is printed with its seed and round, and the exit code is 1.

    python -m benchmarks.fuzz_checkpoints [--minutes 3] [--seeds 0,1] [--kinds nvfp4,Q4_K] [--model PATH]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import torch
from torch import Tensor

from benchmarks.damaged_checkpoints import BYTES, CONFIGURED, KINDS, Parsed, damaged_bytes, parsed
from benchmarks.quantise.kinds import WRITERS
from benchmarks.quantise.original import original
from mesh_core.builtin import installed_plugins
from mesh_core.errors import CheckpointError
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import recognise
from mesh_core.model.numerics import usual_numerics
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.model.weights import WeightReader
from mesh_core.system import file_stamp

MODEL = Path(__file__).parents[1] / "examples" / "tiny-klein" / "model"
MOST_SECONDS = 1.0
MOST_MEMORY = 64 << 20
"""Bytes beyond the size of the file that may be in use at once."""

MOST_RESERVED = 1 << 30
"""Bytes that may be asked for, touched or not."""


class Fuzzer:
    """Files of the ``tensors`` in each of ``kinds``, written to ``folder``."""

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path, kinds: Collection[str], seed: int) -> None:
        self.random, self.seen = random.Random(seed), Counter[str]()
        self.most_seconds, self.most_memory = 0.0, 0
        self.file = folder / "damaged"
        self.intact: dict[str, Parsed] = {
            kind: parsed(WRITERS[kind](tensors, folder / f"{kind}-{seed}", {})) for kind in kinds
        }
        self.file.write_bytes(next(iter(self.intact.values())).content())
        spec = recognise(read_header(self.file), installed_plugins()).spec
        self.config = {"_class_name": "Flux2Transformer2DModel", **spec.config}

    def folder_of(self, content: bytes, changes: Mapping[str, Any]) -> Path:
        """A model's folder with ``content`` as its weights, and a ``config.json`` that has these ``changes``."""
        folder = self.file.with_name("folder")
        folder.mkdir(exist_ok=True)
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(content)
        (folder / "config.json").write_text(json.dumps({**self.config, **changes}))
        return folder

    def round(self) -> None:
        """One damaged file.

        Raises:
            Exception: anything but an orderly end.
        """
        r, kind = self.random, self.random.choice(list(self.intact))
        made = self.intact[kind].copy()
        what = r.choice((*KINDS, *BYTES, *(() if made.gguf else ("config",))))
        for one in [what, *(() if r.random() < 0.8 else r.choices(list(KINDS), k=2))]:
            if one in KINDS:
                KINDS[one](made, self.intact[r.choice(list(self.intact))], r)
        content = made.content()
        if what == "config":
            names = r.choices([*self.config, "quantization_config"], k=r.randint(0, 2))
            path = self.folder_of(content, {name: r.choice(CONFIGURED) for name in names})
        else:
            path = self.file
            path.write_bytes(damaged_bytes(content, what, r) if what in BYTES else content)
        begun, before = process_time(), _memory(reset=True)
        try:
            outcome = check(path, r)
        except CheckpointError as error:
            outcome = type(error).__name__
            assert str(error) and len(str(error)) < 10_000, "a message of no use"
        except BaseException as error:
            error.args = (f"{kind}, {what}: {error}",)
            raise
        took, grew = process_time() - begun, _memory() - before
        self.most_seconds, self.most_memory = max(self.most_seconds, took), max(self.most_memory, grew)
        assert took < MOST_SECONDS, f"{kind}, {what}: took {took:.1f} s, {outcome}"
        assert grew < len(content) + MOST_MEMORY, f"{kind}, {what}: grew by {grew / 1e6:.0f} MB, {outcome}"
        self.seen[f"{what}: {outcome}"] += 1


def check(file: Path, r: random.Random) -> str:
    """Build a stage of all blocks, and make numbers of some of its weights. Raises CheckpointError."""
    plugins = installed_plugins()
    found = recognise(read_header(file), plugins)
    spec, span = found.spec, found.spec.span(":")
    numerics = usual_numerics(spec, torch.bfloat16, torch.device("cpu"), plugins.weight_formats())
    promised = sum(numerics.nbytes(name, parameter) for name, parameter in spec.parameters_of(span).items())
    stage = found.adapter.build_stage(spec, span, WeightReader(found.header), device="cpu", numerics=numerics)
    # Buffers that the class computes are no part of a checkpoint.
    held = list(stage.parameters())
    assert sum(p.nbytes for p in held) == promised, f"{sum(p.nbytes for p in held)} bytes of {promised} promised"
    stored = [p for p in held if isinstance(p, StoredWeight)]
    for weight in r.sample(stored, min(3, len(stored))):
        numbers = weight.dense()
        assert numbers.shape == weight.shape and numbers.dtype == weight.dtype, f"numbers of {weight.label}"
    return "a stage"


def _memory(reset: bool = False) -> int:
    """Bytes in use at most since the last reset, by Linux; 0 elsewhere."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


@contextmanager
def settled() -> Iterator[None]:
    """One processor, no waiting for the clock of the file system, and no more memory to be had than `MOST_RESERVED`."""
    threads, tick, coarse = torch.get_num_threads(), file_stamp._TICK_NS, file_stamp._COARSE_NS
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    torch.set_num_threads(1)
    file_stamp._TICK_NS = file_stamp._COARSE_NS = 0
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_RESERVED, limits[1]))
    try:
        with warnings.catch_warnings():
            # A model class that is told to have layers of no width says so.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            yield
    finally:
        torch.set_num_threads(threads)
        file_stamp._TICK_NS, file_stamp._COARSE_NS = tick, coarse
        resource.setrlimit(resource.RLIMIT_AS, limits)


def small(model: Path) -> dict[str, Tensor]:
    """The tensors of a model of that family with one block of each kind."""
    return {
        name: tensor
        for name, tensor in original(model)[1].items()
        if not name.startswith(("double_blocks", "single_blocks")) or name.split(".")[1] == "0"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="of each seed")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--kinds", default=",".join(WRITERS))
    parser.add_argument("--model", type=Path, default=MODEL, help="a pipeline's folder, of FLUX.2's family")
    options = parser.parse_args()
    tensors, failed = small(options.model), 0
    for seed in map(int, options.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            fuzzer = Fuzzer(tensors, Path(folder), options.kinds.split(","), seed)
            for file in (f for f in Path(folder).iterdir()):
                check(file, fuzzer.random)
            end, rounds, failures = monotonic() + 60 * options.minutes, 0, Counter[str]()
            with settled():
                while monotonic() < end:
                    try:
                        fuzzer.round()
                    except Exception as error:
                        frame = traceback.extract_tb(error.__traceback__)[-1]
                        where = f"{type(error).__name__} at {frame.filename}:{frame.lineno}"
                        if not failures[where]:
                            traceback.print_exc()
                            print(f"seed {seed}, round {rounds}: {where}")
                        failures[where] += 1
                    rounds += 1
            failed += len(failures)
        print(
            f"seed {seed}: {rounds} rounds, at most {fuzzer.most_seconds:.2f} s and {fuzzer.most_memory / 1e6:.0f} MB; "
            + ", ".join(f"{name} {count}" for name, count in sorted(fuzzer.seen.items())),
            flush=True,
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
