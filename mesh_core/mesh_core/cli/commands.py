"""The table of commands: where each is, and its one line of help. Imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """Where a command is (``module:attribute``) and its one line of help.

    The target is empty for what a plugin of the core's own adds: listed here, it is known without loading a plugin.
    """

    target: str
    help: str


COMMANDS: Mapping[str, Command] = {
    "serve": Command("mesh_core.cli.serve:serve", "Run a worker: host spans of the checkpoints in some folders."),
    "join": Command("mesh_core.cli.join:join", "Accept a worker's invite."),
    "keys": Command("mesh_core.cli.keys:keys", "List, invite and revoke those who may use this machine's workers."),
    "inspect": Command("mesh_core.cli.inspect:inspect", "Show what a checkpoint is, its blocks and where to cut it."),
    "generate": Command("mesh_core.cli.generate:generate", "Make a picture over several machines."),
    "lora": Command("mesh_core.cli.lora:lora", "List, send, remove and examine LoRAs."),
    "comfy": Command("mesh_core.cli.comfy:comfy", "Make the nodes known to a ComfyUI."),
    "bench": Command("", "Measure the mesh: on this machine, and over the link to a worker."),
    "doctor": Command("mesh_core.cli.doctor:doctor", "Check this machine, its plugins and its connections."),
    "plugins": Command("mesh_core.cli.plugins:plugins", "List plugins, what they provide and which failed to load."),
}
