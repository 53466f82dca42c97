"""``mesh generate``: a picture or a video from a prompt, over several machines, and what each step cost."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mesh_codec.qualities import EXACT, names


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--local", default=None, help="Blocks that run here, for example :12. Left out: proposed.")
@click.option(
    "--worker", "workers", multiple=True, help="mesh://host:port, or mesh://host:port=12:20 to name its blocks. Repeat."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="Picture or video file. Left out: out.png or out.mp4, by what the pipeline makes.",
)
@click.option(
    "--quality",
    type=click.Choice(names()),
    default=EXACT,
    show_default=True,
    help="How exact the state crosses; lossless is bit for bit.",
)
@click.option("--codec", default=None, help="For example raw; left out: the fastest one for the link and the quality.")
@click.option("--lora", "loras", multiple=True, help="FILE or NAME, or either with =STRENGTH. Repeat.")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Left out: what the model's authors recommend.")
@click.option("--guidance", type=float, default=None, help="Guidance scale; left out: as the authors recommend.")
@click.option("--width", type=click.IntRange(min=16), default=None, help="Pixels.")
@click.option("--height", type=click.IntRange(min=16), default=None, help="Pixels.")
@click.option("--frames", type=click.IntRange(min=1), default=None, help="Of a video.")
@click.option("--fps", type=click.FloatRange(min=1, max=240), default=None, help="Frames of a video per second.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise.")
@click.option("--device", default=None, help="For example cuda:0 or cpu; left out: CUDA where there is one.")
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    default=None,
    help="In which all machines compute; left out: as the file.",
)
@click.option("--stats", "stats_file", type=click.Path(path_type=Path), default=None, help="Write all stats as JSON.")
def generate(
    model: Path,
    prompt: str,
    local: str | None,
    workers: tuple[str, ...],
    output: Path | None,
    quality: Any,
    codec: str | None,
    loras: tuple[str, ...],
    steps: int | None,
    guidance: float | None,
    width: int | None,
    height: int | None,
    frames: int | None,
    fps: float | None,
    seed: int,
    device: str | None,
    dtype: str | None,
    stats_file: Path | None,
) -> None:
    """Make a picture from PROMPT with the pipeline in the folder MODEL, or a video with sound if it makes these."""
    import torch

    from mesh_core.cli.progress import LoadingLine
    from mesh_core.cli.serve import parse_lora
    from mesh_core.programs import media
    from mesh_core.programs.diffusers import load_pipeline, stats
    from mesh_core.programs.pipeline_folder import check_call

    wanted = {"num_inference_steps": steps, "guidance_scale": guidance, "width": width, "height": height}
    wanted |= {"num_frames": frames, "frame_rate": fps}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    file = media.checked_output(output, check_call(model, wanted))
    pipeline = load_pipeline(
        model,
        local=local,
        workers=[parse_worker(w) for w in workers],
        quality=quality,
        codec=codec,
        loras=[parse_lora(text) for text in loras],
        device=device,
        dtype=getattr(torch, dtype) if dtype else None,
        report=LoadingLine(),
    )
    try:
        arguments = {**pipeline.transformer.mesh.checkpoint.spec.defaults, **wanted}
        known = inspect.signature(pipeline.__call__).parameters
        arguments = {name: value for name, value in arguments.items() if name in known}
        made = pipeline(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), **arguments)
        media.save(pipeline, made, wanted, file)
        run = stats(pipeline)
        click.echo(run.table())
        if stats_file is not None:
            stats_file.write_text(json.dumps(asdict(run), indent=2), encoding="utf-8")
        click.echo(f"saved {file}")
    finally:
        pipeline.transformer.mesh.close()


def parse_worker(text: str) -> str | tuple[str, str]:
    """``ADDRESS`` or ``ADDRESS=SPAN``; only what follows the last ``=`` and looks like a span is one."""
    address, sign, span = text.rpartition("=")
    return (address, span) if sign and set(span) <= set("0123456789:") and ":" in span else text
