"""``mesh bench``: what the mesh costs here and over a link, measured with the product's own parts.

Each command says what to measure, and shows or keeps what was found; the measuring is in the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mesh_core.system.option_types import PIXELS, STEPS, PrintableText
from mesh_core.system.terminal import say, say_json, say_lines

if TYPE_CHECKING:
    from mesh_core.bench.step import Measured

C = TypeVar("C", bound=Callable[..., Any])


def _checked(context: click.Context, option: click.Parameter, folder: Path | None) -> Path | None:
    """What can be saved is known before anything is measured."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    return folder


_OUTPUT = (
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option(
        "--save",
        "folder",
        type=click.Path(path_type=Path),
        default=None,
        callback=_checked,
        help="Write JSON and Markdown there.",
    ),
    click.option(
        "--label",
        type=PrintableText(),
        default="",
        help="What the saved results call this machine; left out: cores and processor.",
    ),
)


def _output_options(command: C) -> C:
    """What all of them have: arguments of `_put_out`."""
    for option in reversed(_OUTPUT):
        command = option(command)
    return command


def _put_out(
    name: str, data: Mapping[str, Any], text: str, *, as_json: bool, folder: Path | None, label: str
) -> list[Path]:
    """Print what was found, and save it where that was asked for; returns the files."""
    from mesh_core.bench.report import save

    if as_json:
        say_json(data)
    else:
        say_lines(text)
    saved = save(folder, name, label, data, text) if folder is not None else []
    for path in saved:
        say(f"saved {path}", err=True)
    return saved


@click.group()
def bench() -> None:
    """Measure the mesh: on this machine, and over the link to a worker."""


@bench.command()
@click.option("--steps", type=click.IntRange(2, 100_000), default=40, show_default=True, help="Measured per case.")
@click.option("--small", is_flag=True, help="States of 1 MB only; takes a few seconds.")
@_output_options
def step(steps: int, small: bool, **output: Any) -> None:
    """Measure what a step costs besides computing, on this machine.

    Starts two workers whose blocks do nothing but copy, and sends states of 1, 34 and 38 MB through them, in the clear
    and encrypted. Takes about a minute.
    """
    import torch

    from mesh_core.bench.step import SHAPES, measure
    from mesh_core.bench.step_report import plain, table, verdicts

    torch.set_num_threads(1)
    results: list[Measured] = []
    for encrypted in (False, True):
        say(f"{'encrypted' if encrypted else 'plain'} ...", err=True)
        results += measure(SHAPES[:1] if small else SHAPES, steps, encrypted=encrypted)
    _put_out("step", plain(results), "\n".join([table(results), "", *verdicts(results)]), **output)


@bench.command()
@click.argument("worker")
@click.option("--device", default=None, help="Of this end, for example cuda:0; left out: a GPU if any.")
@_output_options
def link(worker: str, device: str | None, **output: Any) -> None:
    """Measure the link to WORKER, mesh://HOST:PORT, and what each quality would cost over it.

    Needs no model. The state is that of a picture of 1024x1024 in a model 4096 wide. For each quality: the codec that
    would be chosen, what the state takes to get there, and a round trip of as many bytes as a step sends and gets back,
    which really crosses the link.
    """
    from dataclasses import asdict

    from mesh_core.bench.link import measure, table
    from mesh_core.builtin import installed_plugins
    from mesh_core.system.config import Settings
    from mesh_core.system.device import checked_device, default_device

    target = checked_device(device) if device else default_device()
    found = measure(worker, installed_plugins(), Settings.load(), target)
    _put_out("link", asdict(found), table(found), **output)


@bench.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--device", default=None, help="Time the codec engines of this GPU instead, for example cuda; no MODEL.")
@click.option("--prompts", type=click.IntRange(1, 28), default=4, show_default=True, help="How many.")
@click.option("--steps", "all_steps", multiple=True, type=STEPS, default=(4, 8, 28), show_default=True, help="Repeat.")
@click.option(
    "--cut",
    type=click.IntRange(min=1),
    default=None,
    help="Block before which the state crosses; left out: the middle.",
)
@click.option(
    "--text-tokens", type=click.IntRange(1, 4096), default=64, show_default=True, help="That a prompt is padded to."
)
@click.option("--size", type=PIXELS, default=128, show_default=True, help="Height and width of the pictures.")
@_output_options
def codec(model: Path | None, device: str | None, all_steps: tuple[int, ...], **options: Any) -> None:
    """Measure what each codec does to the final pictures of the trained pipeline in the folder MODEL, and in how many
    bits.

    Everything runs in this process: the model's two halves with the codec between them. Takes a few minutes. With
    --save, a plot is written too.
    """
    output = {name: options.pop(name) for name in ("as_json", "folder", "label")}
    if device is not None:
        _engines(device, output)
    elif model is not None:
        _pictures(model, all_steps, options, output)
    else:
        raise click.UsageError("Name the folder of a trained pipeline as MODEL, or a --device.")


def _pictures(model: Path, all_steps: tuple[int, ...], setup: dict[str, Any], output: dict[str, Any]) -> None:
    import torch

    from mesh_core.bench.codec_pictures import Pictures
    from mesh_core.bench.codec_report import in_words, plain, plot, text
    from mesh_core.bench.codec_settings import SETTINGS
    from mesh_core.builtin import installed_plugins

    torch.set_num_threads(1)
    pictures, results = Pictures(model, installed_plugins(), **setup), []
    for found in pictures.measure_all(SETTINGS, all_steps):
        say(in_words(found), err=True)
        results.append(found)
    facts = {"model": model.as_posix(), **setup}
    if saved := _put_out("codec", plain(results, facts), text(results, facts), **output):
        say(f"saved {plot(results, saved[0].with_suffix('.png'))}", err=True)


def _engines(device: str, output: dict[str, Any]) -> None:
    from dataclasses import asdict

    from mesh_core.bench.codec_device import run, table
    from mesh_core.system.device import checked_device
    from mesh_core.system.device import label as name_of

    target, rows = checked_device(device), []
    for row in run(target):
        say(f"{list(row.shape)} {row.codec} ...", err=True)
        rows.append(row)
    output["label"] = output["label"] or name_of(target)
    _put_out("codec-device", {"rows": [asdict(row) for row in rows]}, table(rows), **output)
