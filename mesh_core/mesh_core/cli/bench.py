"""``mesh bench``: what the mesh costs on this machine, measured with the product's own parts."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mesh_core.bench.step import Measured


@click.group()
def bench() -> None:
    """Measure the mesh on this machine."""


@bench.command()
@click.option("--steps", type=click.IntRange(min=2), default=40, show_default=True, help="Measured per case.")
@click.option("--small", is_flag=True, help="States of 1 MB only; takes a few seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--save", "folder", type=click.Path(path_type=Path), default=None, help="Write JSON and Markdown there.")
@click.option("--label", default="", help="What the saved results call this machine; left out: cores and processor.")
def step(steps: int, small: bool, as_json: bool, folder: Path | None, label: str) -> None:
    """Measure what a step costs besides computing, next to bare ZeroMQ.

    Starts two workers on this machine whose blocks do nothing but copy, and sends states of 1, 34 and 38 MB through
    them, in the clear and encrypted. Between the steps the same bytes take the same way over bare pyzmq sockets.
    Takes about a minute.
    """
    import torch

    from mesh_core.bench.report import plain, save, table, verdicts
    from mesh_core.bench.step import SHAPES, measure

    torch.set_num_threads(1)
    results: list[Measured] = []
    for encrypted in (False, True):
        click.echo(f"{'encrypted' if encrypted else 'plain'} ...", err=True)
        results += measure(SHAPES[:1] if small else SHAPES, steps, encrypted=encrypted)
    text = "\n".join([table(results), "", *verdicts(results)])
    click.echo(json.dumps(plain(results), indent=2) if as_json else text)
    if folder is not None:
        for path in save(folder, "step", label, plain(results), text):
            click.echo(f"saved {path}", err=True)


@bench.command()
@click.option(
    "--rate",
    "rates",
    multiple=True,
    default=("1gbit",),
    show_default=True,
    type=click.Choice(("100mbit", "1gbit", "2.5gbit", "10gbit")),
    help="Of the link, each way. Repeat.",
)
@click.option(
    "--model", type=click.Path(path_type=Path, exists=True), default=None, help="A pipeline's folder, to run too."
)
@click.option("--local", default=":4", show_default=True, help="The host's blocks of that model.")
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Measured per row.")
@click.option("--small", is_flag=True, help="A synthetic state of 2 MB instead of 38 MB.")
@click.option("--relay", is_flag=True, help="Shape the link in user space even where the system could.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--save", "folder", type=click.Path(path_type=Path), default=None, help="Write JSON and Markdown there.")
@click.option("--label", default="", help="What the saved results call this machine; left out: cores and processor.")
def link(
    rates: tuple[str, ...],
    model: Path | None,
    local: str,
    steps: int,
    small: bool,
    relay: bool,
    as_json: bool,
    folder: Path | None,
    label: str,
) -> None:
    """Measure whole steps over a slow link: raw, each quality, and the codec left open.

    Starts a host and a worker on this machine with a link of the given rate between them: network namespaces and a
    token bucket where the system is Linux and the user root, else a relay in user space. The synthetic model has the
    state of a 9B model at 1024x1024 pixels and blocks that do nothing but copy. Takes minutes; Ctrl-C ends it with
    what was measured so far.
    """
    from mesh_core.bench.link import LARGE, SMALL, Workload, measure, table, with_ratios
    from mesh_core.bench.report import save

    shape = SMALL if small else LARGE
    workloads = [Workload(f"synthetic state {list(shape)}, bfloat16", steps, shape=shape)]
    if model is not None:
        workloads.append(Workload(f"{model.parent.name}/{model.name}, local {local}", steps, model, local))
    found: list[dict[str, Any]] = []
    with suppress(KeyboardInterrupt):
        # What is there by then is still worth a table.
        for workload, rate in product(workloads, rates):
            for row in measure(rate, workload, relay=relay):
                click.echo(f"{rate} {workload.name}: {row['name']} ...", err=True)
                found.append(row)
    text, data = table(found), {"results": with_ratios(found)}
    click.echo(json.dumps(data, indent=2) if as_json else text)
    if folder is not None:
        for path in save(folder, "link", label, data, text):
            click.echo(f"saved {path}", err=True)


@bench.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--device", default=None, help="Time the codec engines of this GPU instead, for example cuda; no MODEL.")
@click.option("--prompts", type=click.IntRange(1, 28), default=4, show_default=True, help="How many.")
@click.option("--steps", "all_steps", multiple=True, type=int, default=(4, 8, 28), show_default=True, help="Repeat.")
@click.option("--cut", type=int, default=None, help="Block before which the state crosses; left out: the middle.")
@click.option("--text-tokens", type=int, default=64, show_default=True, help="That a prompt is padded to.")
@click.option("--size", type=int, default=128, show_default=True, help="Height and width of the pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--save", "folder", type=click.Path(path_type=Path), default=None, help="Write table, JSON and plot there."
)
@click.option("--label", default="", help="What the saved results call this machine; left out: cores and processor.")
def codec(
    model: Path | None,
    device: str | None,
    prompts: int,
    all_steps: tuple[int, ...],
    cut: int | None,
    text_tokens: int,
    size: int,
    as_json: bool,
    folder: Path | None,
    label: str,
) -> None:
    """Measure what each codec does to the final pictures of the trained pipeline in the folder MODEL, and in how many
    bits.

    Everything runs in this process: the model's two halves with the codec between them. Takes a few minutes.
    """
    if device is not None:
        _engines(device, as_json, folder, label)
        return
    if model is None:
        raise click.UsageError("Name the folder of a trained pipeline as MODEL, or a --device.")
    import torch

    from mesh_core.bench.codec_pictures import Pictures, Quality
    from mesh_core.bench.codec_report import plain, plot, table, verdicts
    from mesh_core.bench.codec_rows import ROWS
    from mesh_core.bench.report import save
    from mesh_core.builtin import installed_plugins

    torch.set_num_threads(1)
    pictures = Pictures(model, installed_plugins(), prompts, cut, text_tokens, size)
    results: list[Quality] = []
    for row in ROWS:
        try:
            for found in pictures.measure_all([row], all_steps):
                click.echo(
                    f"{found.label}, {found.steps} steps: {found.bits:.2f} bits, {found.psnr_min:.1f} dB", err=True
                )
                results.append(found)
        except ImportError as error:
            click.echo(f"{row.label} is left out: {error}", err=True)
    setup = {"model": model.as_posix(), "prompts": prompts, "cut": cut, "text tokens": text_tokens, "size": size}
    listed = ", ".join(f"{name} {value}" for name, value in setup.items() if value is not None)
    text = "\n".join([listed, "", table(results), "", *verdicts(results)])
    data = plain(results, setup)
    click.echo(json.dumps(data, indent=2) if as_json else text)
    if folder is not None:
        saved = save(folder, "codec", label, data, text)
        picture = saved[0].with_suffix(".png")
        plot(results, picture)
        for path in (*saved, picture):
            click.echo(f"saved {path}", err=True)


def _engines(device: str, as_json: bool, folder: Path | None, label: str) -> None:
    from dataclasses import asdict

    from mesh_core.bench.codec_device import run, table
    from mesh_core.bench.report import save
    from mesh_core.system.device import checked_device
    from mesh_core.system.device import label as name_of

    target, rows = checked_device(device), []
    for row in run(target):
        click.echo(f"{list(row.shape)} {row.codec} ...", err=True)
        rows.append(row)
    text, data = table(rows), {"rows": [asdict(row) for row in rows]}
    click.echo(json.dumps(data, indent=2) if as_json else text)
    if folder is not None:
        for path in save(folder, "codec-device", label or name_of(target), data, text):
            click.echo(f"saved {path}", err=True)
