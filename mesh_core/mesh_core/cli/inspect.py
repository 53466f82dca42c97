"""``mesh inspect``: what a checkpoint is, how large its blocks are, and where to cut it. Reads headers only."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import click

_GB = 1e9


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--memory", default="", help="Memory of this machine's GPU, for example 12GB; suggests a cut for it.")
@click.option("--fingerprint", "with_fingerprint", is_flag=True, help="Also hash all weights (reads the whole file).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, memory: str, with_fingerprint: bool, as_json: bool) -> None:
    """Show what a checkpoint is, its blocks and where to cut it.

    PATH is a folder saved by diffusers, or a .safetensors file.
    """
    from mesh_core.builtin import installed_plugins
    from mesh_core.model.checkpoint import read_header
    from mesh_core.model.facts import facts
    from mesh_core.model.library import recognise
    from mesh_core.system.config import parse_bytes

    checkpoint = recognise(read_header(path), installed_plugins())
    found = facts(checkpoint, parse_bytes(memory) if memory else None, with_fingerprint=with_fingerprint)
    click.echo(json.dumps(found, indent=2) if as_json else _text(found))


def _text(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['family']} {facts['variant']}  ({', '.join(facts['dtypes'])}, {facts['bytes'] / _GB:.2f} GB)",
        f"{len(facts['blocks'])} blocks:",
    ]
    position = 0
    for (kind, size), group in groupby(facts["blocks"], key=lambda b: (b["kind"], b["bytes"])):
        count = len(list(group))
        lines.append(f"  {f'{position}:{position + count}':>8}  {kind:<8} {size / 1e6:10.2f} MB each")
        position += count
    if "fingerprint" in facts:
        lines.append(f"fingerprint {facts['fingerprint']}")
    if "suggestion" in facts:
        s = facts["suggestion"]
        lines.append(
            f"With {s['memory'] / _GB:.1f} GB here ({s['reserve'] / _GB:.1f} GB kept free for the rest): "
            f"--local {s['local']} holds {s['local_bytes'] / _GB:.2f} GB, "
            f"{s['remote_bytes'] / _GB:.2f} GB are left for workers."
        )
    return "\n".join(lines)
