"""What each format of weights does to the pictures of a trained model, beside the same model in bfloat16.

Writes tiny-klein in every format, draws with each alone in this process, and measures the pictures against those of the
bfloat16 folder (PSNR: least and mean over the prompts). Then the same file is cut over a worker at one block: the
pictures have to be the same, bit for bit.

    python -m benchmarks.quantised_pictures [--model FOLDER] [--prompts 8] [--steps 8] [--save DIR] [--label TEXT]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.quantise.kinds import WRITERS
from benchmarks.quantise.original import original
from mesh_core import load_pipeline
from mesh_core.bench.codec_pictures import PROMPTS
from mesh_core.builtin import installed_plugins
from mesh_core.testing import mesh_home, thread_workers

_CEILING = 1e-10
"""Mean squared error that counts as none: 100 dB."""


def draw(pipeline: Any, prompts: tuple[str, ...], steps: int) -> Tensor:
    """Pictures [prompts, 3, H, W] between 0 and 1, float32."""
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for prompt in prompts:
        noise = torch.Generator().manual_seed(0)
        made.append(
            pipeline(
                prompt=prompt,
                height=128,
                width=128,
                num_inference_steps=steps,
                guidance_scale=1.0,
                generator=noise,
                output_type="pt",
            ).images.float()
        )
    return torch.cat(made)


def psnr(one: Tensor, other: Tensor) -> list[float]:
    """Of each picture, dB."""
    errors = ((one - other) ** 2).flatten(1).mean(1).clamp_min(_CEILING)
    return [-10 * float(torch.log10(error)) for error in errors]


def run(model: Path, prompts: tuple[str, ...], steps: int) -> dict[str, Any]:
    """Every row of the table."""
    checkpoint, tensors = original(model)
    whole = load_pipeline(model, local=":", device="cpu", dtype=torch.bfloat16)
    expected = draw(whole, prompts, steps)
    cut = f":{checkpoint.spec.blocks // 2}"
    rows = []
    with TemporaryDirectory() as folder, mesh_home(Path(folder) / "home"):
        for kind, write in WRITERS.items():
            file = write(tensors, Path(folder) / kind, checkpoint.header.metadata)
            alone = draw(load_pipeline(file, components=model, local=":", device="cpu"), prompts, steps)
            with thread_workers(file, 1, plugins=installed_plugins()) as (worker,):
                split = load_pipeline(file, components=model, local=cut, workers=[worker.address], device="cpu")
                same = torch.equal(draw(split, prompts[:1], steps), alone[:1])
                split.transformer.mesh.close()
            found = psnr(alone, expected)
            least, mean = min(found), sum(found) / len(found)
            row = {"format": kind, "bytes": file.stat().st_size, "psnr_min": least, "psnr_mean": mean, "exact": same}
            print(_line(row), flush=True)
            rows.append(row)
            file.unlink()
    return {"model": model.name, "prompts": len(prompts), "steps": steps, "cut": cut, "rows": rows}


def _line(row: dict[str, Any]) -> str:
    return (
        f"| {row['format']} | {row['bytes'] / 1e6:.1f} | {row['psnr_min']:.1f} | {row['psnr_mean']:.1f} | "
        f"{'the same bits' if row['exact'] else 'DIFFERENT'} |"
    )


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    head = [
        f"Pictures of {found['prompts']} prompts, {found['steps']} steps, beside the model in bfloat16.",
        "",
        f"| format | file, MB | PSNR min, dB | PSNR mean, dB | cut at {found['cut']} against alone |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(_line, found["rows"])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/tiny-klein/model"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--label", default="2-core CPU virtual machine")
    arguments = parser.parse_args()
    found = run(arguments.model, PROMPTS[: arguments.prompts], arguments.steps)
    print(table(found))
    if arguments.save:
        name = f"quantised-pictures-{arguments.label.lower().replace(' ', '-')}"
        (arguments.save / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (arguments.save / f"{name}.md").write_text(table(found), encoding="utf-8")
    if not all(row["exact"] for row in found["rows"]):
        raise SystemExit("a cut model drew other pictures than the whole one")


if __name__ == "__main__":
    main()
