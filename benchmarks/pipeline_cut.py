"""Whole pipelines with their second half on a worker: what a step costs beyond computing, and what coding does to it.

    python -m benchmarks.pipeline_cut --label "2-core virtual machine" --save benchmarks/results
    python -m benchmarks.pipeline_cut models/LTX-2.3 --device cuda --prompt "rain on a tin roof"

Without folders it compares tiny-klein, which is trained, and an LTX-2.3 with random weights, 16 blocks,
128 and 64 wide: its activations are those of a network that has learnt nothing, on noise that becomes a video of
nothing. They tell whether both streams are coded well against each other, not how good a trained model's video looks.
Pictures and frames are compared by PSNR, the smallest of all frames; sound by the ratio of signal to error.
"""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = (("lossless", "raw"), ("transparent", "entropy"), ("balanced", "entropy"), ("fast", "entropy"))
WARM_UP = 2
_SIZES = {"num_frames": 9, "width": 160, "height": 96}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="pipelines that diffusers saved")
    parser.add_argument("--prompt", default="crying face")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--label", default="", help="of the machine")
    parser.add_argument("--save", type=Path, default=None, help="folder for the results")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mesh-", ignore_cleanup_errors=True)))
        os.environ["MESH_HOME"] = str(scratch / "home")
        folders = arguments.folders or [
            ROOT / "examples" / "tiny-klein" / "model",
            random_video(scratch / "random-ltx"),
        ]
        rows = [row for folder in folders for row in measured(folder, arguments, stack)]
    text = table(rows)
    print(text)
    if arguments.save:
        from mesh_core.bench.report import save

        for path in save(arguments.save, "pipeline-cut", arguments.label, {"rows": rows}, text):
            print(f"saved {path}")


def random_video(folder: Path) -> Path:
    """A pipeline of LTX-2.3's architecture with random weights."""
    import torch

    sys.path.insert(0, str(ROOT))
    from tests.support import video_pipelines

    video_pipelines.save(folder, blocks=16, widen=4, dtype=torch.float32)
    return folder


def measured(folder: Path, arguments: argparse.Namespace, stack: ExitStack) -> list[dict[str, Any]]:
    import torch

    import mesh_core

    torch.set_num_threads(1)
    address = start_worker(stack, folder, arguments.device)
    # CPUs compute in float32 many times faster.
    where = {"device": arguments.device, "dtype": torch.float32 if arguments.device == "cpu" else None}
    whole = mesh_core.load_pipeline(folder, local=":", **where)
    blocks = whole.transformer.mesh.checkpoint.spec.blocks
    expected = call(whole, arguments)
    del whole
    rows = []
    for quality, codec in CASES:
        pipeline = mesh_core.load_pipeline(
            folder,
            local=f":{blocks // 2}",
            workers=[address],
            quality=quality,
            codec=codec,
            **where,
        )
        found = call(pipeline, arguments)
        steps, itemsize = pipeline.transformer.mesh.stats.steps[WARM_UP:], pipeline.transformer.dtype.itemsize
        rows.append(
            {
                "pipeline": folder.parent.name if folder.name == "model" else folder.name,
                "remote": f"{blocks - blocks // 2} of {blocks}",
                "quality": quality,
                "codec": codec,
                "overhead ms": median(s.overhead_ms for s in steps),
                "compute ms": median(s.local_ms + sum(h.compute_ms for h in s.hops) for s in steps),
                "codec ms": median(
                    s.encode_ms + s.decode_ms + sum(h.encode_ms + h.decode_ms for h in s.hops) for s in steps
                ),
                "wire ms": median(s.wire_ms for s in steps),
                "kB in": median(s.hops[0].in_coded for s in steps) / 1e3,
                "bits": 8 * itemsize * median(s.hops[0].in_coded / s.hops[0].in_raw for s in steps),
                **compared(expected, found),
            }
        )
        print(table(rows[-1:]), flush=True)
        pipeline.transformer.mesh.close()
    return rows


def start_worker(stack: ExitStack, folder: Path, device: str) -> str:
    command = [sys.executable, "-m", "mesh_core.cli", "serve", str(folder), "--port", "0", "--device", device]
    process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8"))
    stack.callback(process.kill)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("listening at "):
            return line.removeprefix("listening at ").strip()
    sys.exit("the worker did not start")


def call(pipeline: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Frames or the picture as [n, H, W, C] in 0..1, and sound [channels, samples] if there is any."""
    import numpy as np
    import torch

    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    defaults = pipeline.transformer.mesh.checkpoint.spec.defaults
    chosen = {**defaults, **(_SIZES if "num_frames" in known else {"width": 256, "height": 256})}
    chosen |= {"num_inference_steps": arguments.steps, "prompt": arguments.prompt, "output_type": "np"}
    chosen |= {"max_sequence_length": 64} if not arguments.folders else {}
    made = pipeline(generator=torch.Generator("cpu").manual_seed(0), **{n: v for n, v in chosen.items() if n in known})
    if hasattr(made, "images"):
        return {"frames": np.stack([made.images[0]])}
    sound = getattr(made, "audio", None)
    return {
        "frames": np.asarray(made.frames[0]),
        **({} if sound is None else {"sound": sound[0].float().cpu().numpy()}),
    }


def compared(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    errors = ((expected["frames"] - found["frames"]) ** 2).reshape(len(expected["frames"]), -1).mean(axis=1)
    result = {"PSNR min dB": decibels(1.0, float(errors.max()))}
    if "sound" in expected:
        error = expected["sound"] - found["sound"]
        result["sound SNR dB"] = decibels(float(np.square(expected["sound"]).mean()), float(np.square(error).mean()))
    return result


def decibels(signal: float, error: float) -> float | None:
    """None stands for equal."""
    from math import log10

    return 10 * log10(signal / error) if error else None


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return "-"
        value = row[name]
        if value is None:
            return "equal"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [names, *([cell(row, name) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    main()
