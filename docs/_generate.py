"""Writes the part of docs/reference that follows from the code: cli.md, hooks.md, errors.md.

``python docs/_generate.py`` writes them; with ``--check`` it changes nothing and exits with 1 if one is out of date.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path

import click

import mesh_codec.errors
from mesh_core import errors, hookspecs
from mesh_core.cli import cli

REFERENCE = Path(__file__).parent / "reference"
BRANCH = re.compile(r"^[│├└─ ]*(\w+)\s{2,}(\S.*)$")

ADVICE = {
    "ConfigError": "Correct the setting or option that it names.",
    "PluginNotFound": "Install the package that it names, or choose one of those that it lists.",
    "PluginConflict": "Uninstall all but one of the distributions that it names.",
    "PluginIncompatible": "Upgrade the package that is behind: comfyui-mesh or the plugin.",
    "PluginBroken": "`mesh plugins --json` shows its traceback; upgrade or disable the plugin.",
    "CheckpointUnrecognised": "Install the family's adapter (`mesh plugins` shows them), or use an unquantised copy.",
    "CheckpointMismatch": "Put the same file on both machines; the message names what each end has, or what changed.",
    "CheckpointChanged": "Do the same again, once nothing writes to the file.",
    "CheckpointCorrupt": "Fetch the file again.",
    "PlanError": "Write spans that follow each other without gaps; `mesh inspect` shows the blocks.",
    "PlanDoesNotFit": "Give that machine fewer blocks, or free memory on it.",
    "UnsupportedInput": "Call the model without the input that it names, or run it unsplit.",
    "WireMalformed": "Check that the port is a worker's and that both ends are current.",
    "WireTooLarge": "Make a smaller picture or batch, or raise the limit on the end that refused.",
    "WireUnsupportedVersion": "Update the end that the message names.",
    "Unreachable": "Check that the worker runs and that the address, port and firewall are right: `mesh doctor`.",
    "TransportTimeout": "Raise the deadline if the worker is only slow; else look at its output.",
    "PeerLost": "Wake or restart the worker, and run again.",
    "NotAuthorised": "Join with a new invite: `mesh serve` or `mesh keys invite` there, `mesh join` here.",
    "SessionUnknown": "Nothing: the host opens the session again. If it repeats, look at the worker's output.",
    "ConstantsMissing": "Nothing: the host sends them again. If it repeats, raise worker.constants_cache.",
    "Cancelled": "Nothing: this was asked for.",
    "LoraUnmatched": "Use a LoRA that was made for this model family.",
    "LoraTooLarge": "Put the file into the worker's LoRA folder, or ask for it to be sent.",
    "LoraMissing": "Put the file into the worker's LoRA folder.",
    "RemoteError": "Read the worker's traceback in it (`mesh --verbose`), and report it.",
    "CodecUnsupported": "Choose another quality, or install what the message names on both ends.",
    "CodecCorrupt": "Run again; if it repeats, the two ends run different versions of a codec.",
    "CodecStateLost": "Nothing: a key frame is sent. If it repeats, look at the connection.",
}


def hooks_page() -> str:
    """hooks.md: every hook with its signature and docstring."""
    parts = [
        "# Hooks",
        f"A plugin is a distribution with an entry point in the group `{hookspecs.ENTRY_POINT_GROUP}` that names a "
        "module or an object. Its functions of the names below, marked with `@mesh_core.hookimpl`, are called by the "
        "core. They take the arguments that they need, by name. The module should import little: what a hook needs "
        "is best imported inside of it.",
    ]
    for name, hook in vars(hookspecs).items():
        if name.startswith("mesh_"):
            first = hook.mesh_spec["firstresult"]
            order = "The first result that is not None is used." if first else "Every plugin's is called."
            signature = f"{name}{inspect.signature(hook)}".replace("'", "").replace("collections.abc.", "")
            parts += [f"## {name}", f"```python\n{signature}\n```", _plain(inspect.getdoc(hook)), order]
    return _page("mesh_core/hookspecs.py", parts)


def errors_page() -> str:
    """errors.md: every class of the two trees, its meaning and what to do."""
    parts = [
        "# Errors",
        "Every message says what happened, to what, and what to try. The command line prints the two parts on lines "
        "`error:` and `try:` and exits with 2. A script catches `mesh_core.MeshError` and "
        "`mesh_codec.errors.CodecError`, or any class below.",
    ]
    for module, root in ((errors, errors.MeshError), (mesh_codec.errors, mesh_codec.errors.CodecError)):
        meanings = {found[1]: found[2] for found in map(BRANCH.match, (module.__doc__ or "").splitlines()) if found}
        parts.append(f"## {root.__name__}\n\nDefined in `{module.__name__}`.")
        rows = ["| error | is a | means | what to do |", "|---|---|---|---|"]
        for kind in _tree(root):
            if not kind.__subclasses__() or kind.__name__ in ADVICE:
                name, base = kind.__name__, kind.__bases__[0].__name__
                rows.append(f"| `{name}` | `{base}` | {meanings[name]} | {ADVICE[name]} |")
        parts.append("\n".join(rows))
    return _page("the docstrings of mesh_core/errors.py and mesh_codec/errors.py", parts)


def cli_page() -> str:
    """cli.md: the help of every command, as it is printed."""
    context = click.Context(cli, info_name="mesh", terminal_width=100, max_content_width=100, **cli.context_settings)
    parts = ["# Command line", f"```\n{_help(cli, context)}\n```"]
    for name in cli.list_commands(context):
        if command := cli.get_command(context, name):
            for path, text in _helps(command, name, context):
                parts += [f"## mesh {path}", f"```\n{text}\n```"]
    return _page("the commands' own help", parts)


def _helps(command: click.Command, path: str, parent: click.Context) -> Iterator[tuple[str, str]]:
    context = click.Context(
        command, parent=parent, info_name=path.split()[-1], terminal_width=100, max_content_width=100
    )
    yield path, _help(command, context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            if below := command.get_command(context, name):
                yield from _helps(below, f"{path} {name}", context)


def _help(command: click.Command, context: click.Context) -> str:
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def _tree(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def _plain(text: str | None) -> str:
    return (text or "").replace("``", "`")


def _page(source: str, parts: list[str]) -> str:
    note = f"<!-- Generated from {source} by docs/_generate.py; make docs writes it anew. -->"
    return "\n\n".join([note, *parts]) + "\n"


def main() -> int:
    """Write the pages, or with ``--check`` compare them."""
    stale = False
    for name, content in (("cli.md", cli_page()), ("hooks.md", hooks_page()), ("errors.md", errors_page())):
        file = REFERENCE / name
        held = file.read_text(encoding="utf-8") if file.exists() else ""
        if sys.argv[1:] == ["--check"]:
            stale |= held != content
            sys.stdout.writelines(
                unified_diff(held.splitlines(True), content.splitlines(True), f"{name} (committed)", f"{name} (code)")
            )
        elif held != content:
            file.write_text(content, encoding="utf-8", newline="\n")
    if stale:
        print("docs/reference is out of date: make docs")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
