"""A picture from a model that is cut over this process and two worker processes, beside the same picture uncut.

    python examples/demo.py --prompt "crying face"

Starts two workers on loopback, generates with the same seed unsplit, split without loss and split with compression,
writes the three pictures side by side, and prints what the split cost. Runs on any machine that runs torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = HERE / "tiny-klein" / "model"
SIZE = 128
STEPS = 8
SEED = 7
LOCAL = ":4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="crying face", help="what to draw")
    parser.add_argument("--output", type=Path, default=Path("out") / "demo.png", help="the picture to write")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="mesh-demo-", ignore_cleanup_errors=True))
        os.environ["MESH_HOME"] = home
        workers = [start_worker(stack, name) for name in ("worker-1", "worker-2")]
        run(arguments.prompt, workers, arguments.output)


def start_worker(stack: ExitStack, name: str) -> str:
    """Start ``mesh serve`` as a process of its own; returns its address."""
    command = [sys.executable, "-m", "mesh_core.cli", "serve", str(MODEL), "--port", "0", "--name", name]
    process = stack.enter_context(
        subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True, encoding="utf-8")
    )
    stack.callback(process.kill)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("listening at "):
            print(f"{name} (process {process.pid}) listens at {line.removeprefix('listening at ').strip()}")
            return line.removeprefix("listening at ").strip()
    sys.exit(f"{name} did not start:\n{''.join(seen)}")


def run(prompt: str, workers: list[str], output: Path) -> None:
    from diffusers.utils import logging

    import mesh_core

    logging.disable_progress_bar()
    pictures: list[tuple[str, Any]] = []
    uncut = mesh_core.load_pipeline(MODEL, local=":", device="cpu")
    whole, seconds = generate(uncut, prompt)
    pictures.append((f"one machine, {seconds:.1f} s", whole))
    tables = []
    for quality in ("lossless", "transparent"):
        # Within one machine nothing would be coded, since that is faster; the demo is to show what it does.
        codec = None if quality == "lossless" else "entropy"
        pipeline = mesh_core.load_pipeline(
            MODEL, local=LOCAL, workers=workers, quality=quality, codec=codec, device="cpu"
        )
        generate(pipeline, prompt, steps=1)
        pipeline.transformer.mesh.stats.clear()
        picture, seconds = generate(pipeline, prompt)
        pictures.append((f"3 processes, {quality}, {seconds:.1f} s", picture))
        tables.append((quality, pipeline.transformer.mesh.stats.table(), picture))
        pipeline.transformer.mesh.close()
    for quality, table, picture in tables:
        print(f"\n{quality}: {verdict(whole, picture)}\n{table}")
    save(pictures, output, prompt)
    print(f"\nsaved {output}")


def generate(pipeline: Any, prompt: str, steps: int = STEPS) -> tuple[Any, float]:
    """The picture as an array in 0..1, and the seconds that it took."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    began = perf_counter()
    generator = torch.Generator("cpu").manual_seed(SEED)
    result = pipeline(
        prompt=prompt, height=SIZE, width=SIZE, num_inference_steps=steps, generator=generator, output_type="np"
    )
    return result.images[0], perf_counter() - began


def verdict(whole: Any, split: Any) -> str:
    """How the split picture compares with the uncut one."""
    import numpy as np

    if np.array_equal(whole, split):
        return "every bit of the picture equals that of the uncut model"
    error = float(np.mean((whole.astype(np.float64) - split.astype(np.float64)) ** 2))
    return f"PSNR {10 * np.log10(1 / error):.1f} dB against the uncut model"


def save(pictures: list[tuple[str, Any]], output: Path, prompt: str) -> None:
    from PIL import Image, ImageDraw

    scale, margin, caption = 2, 12, 28
    side = SIZE * scale
    sheet = Image.new("RGB", (margin + len(pictures) * (side + margin), side + 2 * caption + margin), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 8), f'"{prompt}"', fill="black", font_size=15)
    for column, (text, picture) in enumerate(pictures):
        left = margin + column * (side + margin)
        image = Image.fromarray((picture * 255).round().astype("uint8"))
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, caption))
        draw.text((left, caption + side + 6), text, fill="black", font_size=14)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)


if __name__ == "__main__":
    main()
