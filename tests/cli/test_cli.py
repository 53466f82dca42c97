"""The command line's frame: fast help, and errors that a reader can act on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mesh_codec.errors import CodecCorrupt
from mesh_core import __version__, builtin
from mesh_core.bench import plugin as bench_plugin
from mesh_core.builtin import installed_plugins
from mesh_core.cli import COMMANDS, FAILED, MeshGroup, cli
from mesh_core.errors import PeerLost, RemoteError
from mesh_core.hookspecs import ENTRY_POINT_GROUP, hookimpl
from mesh_core.plugins.registry import Plugins

HEAVY = [
    "torch",
    "zmq",
    "diffusers",
    "transformers",
    "numpy",
    "rich",
    "mesh_codec",
    "mesh_flux2",
    "mesh_core.plugins.registry",
]


@pytest.fixture(autouse=True)
def fresh_plugins() -> Iterator[None]:
    """A command is a process of its own; here others may have cached the plugins of another environment."""
    installed_plugins.cache_clear()
    yield
    installed_plugins.cache_clear()


def loaded_by(code: str) -> set[str]:
    """Which of the heavy modules a fresh process has loaded after ``code``."""
    tail = f"\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_loads_nothing_heavy() -> None:
    code = "from mesh_core.cli import cli\ncli(['--help'], standalone_mode=False)"
    assert loaded_by(code) == set()


def test_help_of_a_command_that_a_plugin_adds_loads_no_other_plugin() -> None:
    code = "from mesh_core.cli import cli\ncli(['bench', '--help'], standalone_mode=False)"
    assert loaded_by(code) <= {"mesh_codec", "mesh_core.plugins.registry"}


def test_help_lists_each_command_that_exists_with_its_line() -> None:
    shown = " ".join(CliRunner().invoke(cli, ["--help"], terminal_width=200).output.split())
    assert set(cli.list_commands(click.Context(cli))) >= {"plugins"}
    for name in cli.list_commands(click.Context(cli)):
        assert f"{name} {COMMANDS[name].help}" in shown


def test_every_listed_command_can_be_loaded_and_documents_its_options() -> None:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None and command.help, name
        undocumented = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
        assert undocumented == [], name


def test_the_console_script_is_installed_and_tells_its_version() -> None:
    script = shutil.which("mesh", path=str(Path(sys.executable).parent))
    assert script is not None
    shown = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert shown == f"mesh, version {__version__}\n"


def failing(error: Exception) -> MeshGroup:
    group = MeshGroup("mesh", params=[click.Option(["--verbose"], is_flag=True)])

    def fail() -> None:
        raise error

    group.get_command = lambda ctx, name: click.Command("go", callback=fail)  # type: ignore[method-assign]
    return group


@pytest.mark.parametrize("kind", [PeerLost, CodecCorrupt])
def test_an_expected_error_is_two_lines_and_no_traceback(kind: type[Exception]) -> None:
    error = kind("Worker attic is silent since 12:01.", hint="wake it")  # type: ignore[call-arg]
    result = CliRunner().invoke(failing(error), ["go"])
    assert result.exit_code == FAILED
    assert result.stderr == "error: Worker attic is silent since 12:01.\ntry: wake it\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message", "help_of"),
    [
        (["--bogus"], "'--bogus'", "mesh"),
        (["bogus"], "'bogus'", "mesh"),
        (["join"], "INVITE", "mesh join"),
        (["lora", "bogus"], "'bogus'", "mesh lora"),
        (["lora", "rm", "--bogus"], "'--bogus'", "mesh lora rm"),
        (["generate", "model", "face", "--quality", "best"], "'lossless', 'transparent'", "mesh generate"),
    ],
)
def test_a_mistake_in_the_command_line_looks_like_any_other_error(
    arguments: list[str], message: str, help_of: str
) -> None:
    result = CliRunner().invoke(cli, arguments, prog_name="mesh")
    assert result.exit_code == FAILED and result.stdout == ""
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ") and message in error
    assert hint == f"try: {help_of} --help"


@pytest.mark.parametrize("group", [[], ["lora"]])
def test_a_group_without_a_command_shows_its_help(group: list[str]) -> None:
    assert "Commands:" in CliRunner().invoke(cli, group).output


def test_what_the_system_refuses_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    try:
        (tmp_path / "file" / "below").write_text("")
    except OSError as error:
        refused = error
    result = CliRunner().invoke(failing(refused), ["go"])
    assert result.exit_code == FAILED
    message, hint = result.stderr.splitlines()
    assert message.startswith(f"error: {tmp_path / 'file' / 'below'}: ") and hint.startswith("try: ")
    verbose = CliRunner().invoke(failing(refused), ["--verbose", "go"])
    assert "Traceback" in verbose.stderr and "write_text" in verbose.stderr


def test_verbose_shows_both_ends_tracebacks() -> None:
    error = RemoteError("out of memory", worker="attic", remote_traceback="File remote.py, line 3")
    result = CliRunner().invoke(failing(error), ["--verbose", "go"])
    assert result.exit_code == FAILED
    assert "On attic:\nFile remote.py, line 3" in result.stderr
    assert "Traceback (most recent call last)" in result.stderr


def test_an_unexpected_error_is_not_dressed_up() -> None:
    result = CliRunner().invoke(failing(ZeroDivisionError("a defect")), ["go"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_damaged_settings_file_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text("[worker]\nprot = 1\n")
    command = [sys.executable, "-m", "mesh_core.cli", "plugins"]
    done = subprocess.run(command, env={**os.environ, "MESH_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == FAILED
    assert "worker.prot is no setting" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_of_plugins_names_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_DISABLE_PLUGINS", "flux2,klein,ltx")
    result = CliRunner().invoke(cli, ["plugins"])
    assert result.exit_code == 0
    assert "core.split" in result.output
    assert "codec raw" in result.output
    assert "hook mesh_propose_split" in result.output, "what only answers hooks says which"
    assert "Disabled in the settings" in result.output


@hookimpl
def mesh_add_commands(cli: click.Group) -> None:
    """This module as a plugin that wants the core's name for its own command, beside another one."""
    cli.add_command(click.Command("bench", callback=lambda: click.echo("theirs")))
    cli.add_command(click.Command("theirs", callback=lambda: click.echo("theirs")))


def test_a_plugin_cannot_take_the_name_of_a_command_that_the_core_adds_as_a_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rival = EntryPoint("rival", __name__, ENTRY_POINT_GROUP)
    plugins = Plugins({"core.bench": bench_plugin}, [rival])
    monkeypatch.setattr(builtin, "installed_plugins", lambda: plugins)
    assert "step" in CliRunner().invoke(cli, ["bench", "--help"]).output
    assert CliRunner().invoke(cli, ["theirs"]).output == "theirs\n"
    reports = {r["name"]: r for r in json.loads(CliRunner().invoke(cli, ["plugins", "--json"]).stdout)["plugins"]}
    assert (reports["core.bench"]["status"], reports["core.bench"]["provides"]) == ("loaded", ["command bench"])
    assert (reports["rival"]["status"], reports["rival"]["provides"]) == ("conflict", ["command theirs"])


def test_a_command_of_the_core_s_own_plugin_says_so_when_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "installed_plugins", lambda: Plugins({}, []))
    result = CliRunner().invoke(cli, ["bench"])
    assert result.exit_code == FAILED
    assert "'bench' is not in use" in result.stderr and "mesh plugins" in result.stderr
