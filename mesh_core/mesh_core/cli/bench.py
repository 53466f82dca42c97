"""``mesh bench``: what the mesh costs on this machine, measured with the product's own parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

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
