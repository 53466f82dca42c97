"""``mesh inspect``: what a checkpoint is, how large its blocks are, and where to cut it. Reads headers only."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import click

from mesh_core.system.config import in_bytes
from mesh_core.system.terminal import say_json, say_lines


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--memory", default="", help="Memory of this machine's GPU, for example 12GB; suggests a cut for it.")
@click.option("--fingerprint", "with_fingerprint", is_flag=True, help="Also hash all weights (reads the whole file).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, memory: str, with_fingerprint: bool, as_json: bool) -> None:
    """Show what a checkpoint is, its blocks and where to cut it.

    PATH is a folder saved by diffusers, or a .safetensors or .gguf file.
    """
    from mesh_core.builtin import installed_plugins
    from mesh_core.model.checkpoint import read_header
    from mesh_core.model.facts import facts
    from mesh_core.model.library import recognise
    from mesh_core.system.config import parse_bytes

    checkpoint = recognise(read_header(path), installed_plugins())
    found = facts(checkpoint, parse_bytes(memory) if memory else None, with_fingerprint=with_fingerprint)
    if as_json:
        say_json(found)
    else:
        say_lines(_lines(found))


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{facts['family']} {facts['variant']}  ({', '.join(facts['dtypes'])}, {in_bytes(facts['bytes'])})",
        f"{len(facts['blocks'])} blocks:",
    ]
    position = 0
    for (kind, size), group in groupby(facts["blocks"], key=lambda b: (b["kind"], b["bytes"])):
        count = len(list(group))
        lines.append(f"  {f'{position}:{position + count}':>8}  {kind:<8} {in_bytes(size):>10} each")
        position += count
    if "fingerprint" in facts:
        lines.append(f"fingerprint {facts['fingerprint']}")
    if "suggestion" in facts:
        s = facts["suggestion"]
        lines.append(
            f"With {in_bytes(s['memory'])} here ({in_bytes(s['reserve'])} kept free for the rest): "
            f"--local {s['local']} holds {in_bytes(s['local_bytes'])}, "
            f"{in_bytes(s['remote_bytes'])} are left for workers."
        )
    else:
        lines.append("Where to cut it for this machine: --memory, for example --memory 12GB.")
    return lines
