"""What ``mesh serve`` says when it starts: what it serves, what it left out and why, and how to reach it."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mesh_core.system.terminal import Coloured, say

if TYPE_CHECKING:
    from mesh_core.errors import CheckpointError
    from mesh_core.worker.server import Worker

_LISTED = 10
"""Files that were left out are listed up to this many; the others are counted."""


def announce(worker: Worker, address: str) -> None:
    """Tell a person what is served and how to use it; programs read the last line."""
    from mesh_core.transport.address import is_loopback, parse_place
    from mesh_core.transport.invites import create_invite

    for checkpoint in worker.library.scan():
        say(f"  {checkpoint.name}: {checkpoint.spec.family} {checkpoint.spec.variant}", err=True)
    if known := worker.loras.lora_library.listing():
        say(f"  {len(known)} LoRAs", err=True)
    _say_skipped(worker.library.skipped)
    place = parse_place(address)
    if place.insecure:
        say(Coloured("NOT encrypted: whoever reaches this port can use this worker.", "red"), err=True)
    elif not is_loopback(place.host):
        invite = create_invite(address, name=worker.options.name)
        until = datetime.fromtimestamp(invite.until).strftime("%H:%M")
        say(f"To use it from another machine, run there (works once, until {until}):", err=True)
        say(f'  mesh join "{invite}"', err=True)
    say(f"listening at {address}", err=True)
    sys.stderr.flush()


def _say_skipped(skipped: dict[Path, CheckpointError]) -> None:
    for path, error in list(skipped.items())[:_LISTED]:
        say(f"  not served: {_why(path, error)}", err=True)
    if len(skipped) > _LISTED:
        say(f"  and {len(skipped) - _LISTED} more files that are not served", err=True)


def _why(path: Path, error: CheckpointError) -> str:
    if _is_lora(path):
        return f"{path} is a LoRA: name it, or its folder, with --loras."
    return error.message


def _is_lora(path: Path) -> bool:
    from mesh_core.errors import CheckpointError
    from mesh_core.loras.endings import split_key
    from mesh_core.model.checkpoint import read_header

    try:
        tensors = read_header(path).tensors
    except CheckpointError:
        return False
    return 2 * sum(split_key(name) is not None for name in tensors) > len(tensors)
