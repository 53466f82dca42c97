"""The command line's frame: the table of commands, how errors look, how plugins add commands.

Each command lives in a module of its own, imported when it runs: ``mesh --help`` must not wait for torch.
A command raises `MeshError` or `CodecError` for what it expects to go wrong; this is the one place that prints them.
"""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from typing import Any

import click

from mesh_core import __version__
from mesh_core.cli.commands import COMMANDS, Command
from mesh_core.errors import MeshError, RemoteError

FAILED = 2
"""Exit code after an error that the mesh raised on purpose."""


class MeshGroup(click.Group):
    """A group that knows its commands by table, and asks plugins for names that are not in it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if target := COMMANDS.get(cmd_name, Command("", "")).target:
            module, _, attribute = target.partition(":")
            command: click.Command = getattr(import_module(module), attribute)
            return command
        from mesh_core.cli.plugin_commands import plugin_command

        return plugin_command(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in self.list_commands(ctx)])
        with formatter.section("Plugins"):
            formatter.write_text("Plugins may add commands of their own: see 'mesh plugins'.")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except _expected() as error:
            _render(error, verbose=ctx.params["verbose"])
            ctx.exit(FAILED)


def _expected() -> tuple[type[BaseException], ...]:
    # Nobody can have raised a codec error unless its module is loaded; importing it to find out would load torch.
    codec_errors = sys.modules.get("mesh_codec.errors")
    return (MeshError, codec_errors.CodecError) if codec_errors else (MeshError,)


def _render(error: BaseException, *, verbose: bool) -> None:
    if verbose:
        if isinstance(error, RemoteError) and error.remote_traceback:
            click.echo(f"On {error.worker or 'the worker'}:\n{error.remote_traceback}\nHere:", err=True)
        click.echo("".join(traceback.format_exception(error)), err=True)
    click.secho(f"error: {getattr(error, 'message', error)}", fg="red", err=True)
    if hint := getattr(error, "hint", ""):
        click.echo(f"try: {hint}", err=True)


@click.group(cls=MeshGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mesh")
@click.option("--verbose", is_flag=True, help="Show tracebacks with errors.")
def cli(verbose: bool) -> None:
    """Run diffusion models that are too big for one GPU on several GPUs joined by ordinary networks."""


def main() -> None:
    """The console script."""
    cli(prog_name="mesh")
