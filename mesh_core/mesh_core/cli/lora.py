"""``mesh lora``: the LoRAs of this machine and of workers."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mesh_core.system.config import in_bytes
from mesh_core.system.tables import aligned
from mesh_core.system.terminal import say, say_json, say_lines

if TYPE_CHECKING:
    from mesh_core.host.remote import Remote


@click.group()
def lora() -> None:
    """List, send, remove and examine LoRAs.

    A worker has those of the folders that it was started with (mesh serve --loras), and those that hosts sent.
    """


@lora.command("list")
@click.argument("address", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_loras(address: str | None, as_json: bool) -> None:
    """Show the LoRAs of the worker at ADDRESS; of this machine without one."""
    if address is None:
        from mesh_core.loras.library import own_library
        from mesh_core.system.config import Settings

        found = own_library(Settings.load()).listing()
    else:
        from mesh_core.host.kept_loras import listed

        with closing(_connected(address)) as remote:
            found = listed(remote)
    if as_json:
        say_json(found)
    else:
        say_lines(_table(found))


@lora.command()
@click.argument("address")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", required=True, type=click.Path(path_type=Path), help="The checkpoint that they are for.")
def push(address: str, files: tuple[Path, ...], model: Path) -> None:
    """Send FILES to the library of the worker at ADDRESS, whole, whatever their size.

    A transfer that broke off, or that Ctrl-C ended, goes on from where it was when the same command is run again.
    """
    from mesh_core.builtin import installed_plugins
    from mesh_core.cli.progress import LoadingLine
    from mesh_core.host.loras import send
    from mesh_core.loras.read import read_lora
    from mesh_core.model import fingerprint
    from mesh_core.model.checkpoint import read_header
    from mesh_core.model.library import recognise
    from mesh_core.system.config import Settings

    checkpoint = recognise(read_header(model), installed_plugins())
    loras = [read_lora(file, checkpoint) for file in files]
    with closing(_connected(address)) as remote:
        for one in loras:
            sent = send(remote, one, fingerprint.structure(checkpoint.spec), Settings.load(), LoadingLine())
            say(f"{one.name}  {one.id[:12]}  {f'{in_bytes(sent)} sent' if sent else 'was there'}")


@lora.command()
@click.argument("address")
@click.argument("which")
def rm(address: str, which: str) -> None:
    """Remove a LoRA that was sent to the worker at ADDRESS. WHICH is its name or the start of its hash."""
    from mesh_core.host.kept_loras import discard

    with closing(_connected(address)) as remote:
        gone = discard(remote, which)
    say(f"removed {gone['name']} ({gone['id'][:12]})")


@lora.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", default=None, type=click.Path(path_type=Path), help="Say what it does to this checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, model: Path | None, as_json: bool) -> None:
    """Show what the LoRA in FILE is; with --model, also which weights it changes, and which keys match none."""
    from mesh_core.builtin import installed_plugins
    from mesh_core.loras.file_facts import effect, facts

    found = facts(file)
    if model is not None:
        found |= effect(file, model, installed_plugins())
    if as_json:
        say_json(found)
    else:
        say_lines(_lines(found))


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"{facts['file']}: {facts['tensors']} tensors, {in_bytes(facts['bytes'])}"]
    lines += [f"  {key}: {facts[key]}" for key in ("title", "base", "trigger") if key in facts]
    if "id" in facts:
        kinds = ", ".join(f"{n} x {name}" for name, n in facts["algorithms"].items())
        lines.append(f"  for {facts['family']}: {kinds}; changes {facts['parameters']} weights")
        lines.append(f"  hash {facts['id']}")
        lines.append(f"  {len(facts['unmatched'])} keys match nothing" + (":" if facts["unmatched"] else ""))
        lines += [f"    {key}" for key in facts["unmatched"][:20]]
        if len(facts["unmatched"]) > 20:
            lines.append(f"    and {len(facts['unmatched']) - 20} more")
    return lines


def _table(loras: list[dict[str, Any]]) -> list[str]:
    if not loras:
        return ["no LoRAs"]
    rows = [["name", "size", "hash", "for", "words"]]
    for x in loras:
        made_for = str(x.get("family") or x.get("base") or "")
        rows.append([str(x["name"]), in_bytes(x["bytes"]), str(x["id"])[:12], made_for, str(x.get("trigger") or "")])
    return aligned(rows, left=5)


def _connected(address: str) -> Remote:
    from mesh_core.builtin import installed_plugins
    from mesh_core.host.remote import Remote
    from mesh_core.system.config import Settings
    from mesh_core.transport.base import Address

    remote = Remote(Address(address), installed_plugins(), Settings.load())
    remote.connect()
    return remote
