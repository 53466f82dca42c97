"""``mesh generate``: a picture or a video from a prompt, over several machines, and what each step cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mesh_codec.qualities import EXACT, names
from mesh_core.cli.values import parse_lora, parse_worker
from mesh_core.errors import ConfigError
from mesh_core.system.allocator import use_growing_segments
from mesh_core.system.option_types import PIXELS, SEED, STEPS, FiniteNumber, PrintableText
from mesh_core.system.terminal import say, say_lines

_CALL = ("num_inference_steps", "guidance_scale", "width", "height", "num_frames", "frame_rate")
"""Options that are arguments of the pipeline's call and have its names; `load_pipeline` knows those that are left."""


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompt", type=PrintableText())
@click.option("--local", default=None, help="Blocks that run here, for example :12. Left out: proposed.")
@click.option(
    "--worker",
    "workers",
    multiple=True,
    help="HOST:PORT or mesh://HOST:PORT, with =12:20 behind it to name its blocks. Repeat.",
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
@click.option(
    "--steps",
    "num_inference_steps",
    type=STEPS,
    default=None,
    help="Left out: what the model's authors recommend.",
)
@click.option(
    "--guidance",
    "guidance_scale",
    type=FiniteNumber(),
    default=None,
    help="Guidance scale; left out: as the authors recommend.",
)
@click.option("--width", type=PIXELS, default=None, help="Left out: what the model was made for.")
@click.option("--height", type=PIXELS, default=None, help="Left out: what the model was made for.")
@click.option("--frames", "num_frames", type=click.IntRange(1, 100_000), default=None, help="Of a video.")
@click.option(
    "--fps", "frame_rate", type=FiniteNumber(min=1, max=240), default=None, help="Frames of a video per second."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise.")
@click.option("--device", default=None, help="For example cuda:0 or cpu; left out: CUDA where there is one.")
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    default=None,
    help="In which all machines compute; left out: as the file.",
)
@click.option("--variant", default=None, help="Of the weights in MODEL, for example fp16; left out: the plain ones.")
@click.option(
    "--components",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder of the pipeline that MODEL, a transformer in a single file, belongs to.",
)
@click.option("--stats", "stats_file", type=click.Path(path_type=Path), default=None, help="Write all stats as JSON.")
def generate(
    model: Path,
    prompt: str,
    *,
    output: Path | None,
    seed: int,
    stats_file: Path | None,
    workers: tuple[str, ...],
    loras: tuple[str, ...],
    **options: Any,
) -> None:
    """Make a picture from PROMPT with the pipeline in the folder MODEL, or a video with sound if it makes these.

    MODEL may be a transformer in a single file, .safetensors or .gguf, with --components.
    """
    use_growing_segments()
    from mesh_core.cli.progress import LoadingLine
    from mesh_core.programs.generate import generate as make
    from mesh_core.programs.media import writable

    if stats_file is not None:
        writable(stats_file, "--stats")
        if output is not None and output.absolute() == stats_file.absolute():
            raise ConfigError(f"--output and --stats are one file, {output}.", hint=f"--stats {output.stem}.json")
    file, run = make(
        model,
        prompt,
        {name: value for name in _CALL if (value := options.pop(name)) is not None},
        seed=seed,
        output=output,
        workers=[parse_worker(text) for text in workers],
        loras=[parse_lora(text) for text in loras],
        report=LoadingLine(),
        **options,
    )
    say_lines(run.table())
    if stats_file is not None:
        stats_file.write_text(json.dumps(asdict(run), indent=2), encoding="utf-8")
    say(f"saved {file}")
