"""The command line's frame: the table of commands, how errors look, how plugins add commands.

Each command lives in a module of its own, imported when it runs: ``mesh --help`` must not wait for torch.
A command raises `MeshError` or `CodecError` for what it expects to go wrong; this is the one place that prints them,
beside what the system refuses and what is wrong with the command line itself.
"""

from __future__ import annotations

import errno
import sys
import traceback
from importlib import import_module
from typing import Any, NoReturn

import click

from mesh_core import __version__
from mesh_core.cli.commands import COMMANDS, Command
from mesh_core.errors import ConfigError, MeshError, RemoteError
from mesh_core.system.logs import start_logging
from mesh_core.system.terminal import Coloured, say, say_lines

FAILED = 2
"""Exit code after an error that the mesh raised on purpose."""

_ELSEWHERE = "another file or folder, or permission to use this one"
_SYSTEM_HINTS = {
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.EISDIR: "a file in that folder",
    errno.ENOTDIR: "another path",
    errno.ENOENT: "check the path",
    errno.EEXIST: "another path",
    errno.ENOSPC: "free some space",
    errno.EMFILE: "a higher limit of open files (ulimit -n)",
    errno.EADDRINUSE: "another port",
}
"""By error number. On Windows, Python gives the same numbers for these."""


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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            return _refuse(error)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            return _refuse(error)
        except BrokenPipeError:
            # Whoever read the output has gone, for example head: click ends quietly.
            raise
        except OSError as error:
            _render(_as_expected(error), verbose=ctx.params["verbose"])
            ctx.exit(FAILED)
        except _expected() as error:
            _render(error, verbose=ctx.params["verbose"])
            ctx.exit(FAILED)


def _expected() -> tuple[type[BaseException], ...]:
    # Nobody can have raised a codec error unless its module is loaded; importing it to find out would load torch.
    codec_errors = sys.modules.get("mesh_codec.errors")
    return (MeshError, codec_errors.CodecError) if codec_errors else (MeshError,)


def _as_expected(error: OSError) -> MeshError:
    """What the system refused, as an error of the mesh: a full disk or a file without permission is no defect."""
    what = f"{error.filename}: " if error.filename is not None else ""
    hint = _SYSTEM_HINTS.get(error.errno or 0, "mesh --verbose before the command shows where")
    found = ConfigError(f"{what}{error.strerror or error}.", hint=hint)
    found.__cause__ = error
    return found


def _refuse(error: click.UsageError) -> NoReturn:
    """Show what is wrong with the command line as any other error, and end."""
    if type(error).__name__ == "NoArgsIsHelpError":  # not in every click that is supported
        raise error
    path = error.ctx.command_path if error.ctx is not None else "mesh"
    _render(MeshError(" ".join(error.format_message().split()), hint=f"{path} --help"), verbose=False)
    raise click.exceptions.Exit(error.exit_code)


def _render(error: BaseException, *, verbose: bool) -> None:
    if verbose:
        if isinstance(error, RemoteError) and error.remote_traceback:
            say(f"On {error.worker or 'the worker'}:", err=True)
            say_lines(error.remote_traceback, err=True)
            say("Here:", err=True)
        say_lines("".join(traceback.format_exception(error)), err=True)
    first, *more = str(getattr(error, "message", error)).split("\n")
    say(Coloured(f"error: {first}", "red"), err=True)
    for line in more:
        say(f"  {line}", err=True)
    if hint := getattr(error, "hint", ""):
        say(f"try: {hint}", err=True)


@click.group(cls=MeshGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mesh")
@click.option("--verbose", is_flag=True, help="Show tracebacks with errors.")
def cli(verbose: bool) -> None:
    """Run diffusion models that are too big for one GPU on several GPUs joined by ordinary networks."""
    start_logging()


def main() -> None:
    """The console script."""
    sys.excepthook = lambda *defect: say_lines("".join(traceback.format_exception(*defect)), err=True)
    cli(prog_name="mesh")
