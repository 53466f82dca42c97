"""What reaches the terminal when a worker, its LoRAs and its errors are called whatever a hostile machine likes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mesh_core.builtin import installed_plugins, load_plugins
from mesh_core.cli import FAILED, cli
from mesh_core.cli.progress import LoadingLine
from mesh_core.errors import RemoteError
from mesh_core.host.loras import send
from mesh_core.host.progress import Activity, Phase
from mesh_core.host.remote import Remote
from mesh_core.loras.read import read_lora
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import recognise
from mesh_core.system import terminal
from mesh_core.system.config import Settings
from mesh_core.testing.workers import ThreadWorker
from mesh_core.transport.base import Address
from mesh_core.transport.keys import KeyStore, KnownWorker
from tests.cli.test_cli import failing
from tests.support import loras
from tests.support.foreign import NASTY, assert_harmless
from tests.support.workers import mesh_home

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-klein"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadWorker]:
    """Has a name like that, a LoRA that was sent to it under one, and one of its own whose file says such things."""
    folder, plugins = tmp_path_factory.mktemp("loras"), load_plugins()
    loras.save(
        folder / "ink.safetensors",
        loras.peft({"x_embedder": (256, 16)}),
        **{"modelspec.title": NASTY},
        **{"modelspec.trigger_phrase": NASTY},
    )
    with mesh_home(tmp_path_factory.mktemp("home")):
        worker = ThreadWorker((EXAMPLE / "model",), plugins, NASTY, "mesh://127.0.0.1:0", loras=(folder,))
        try:
            checkpoint = recognise(read_header(EXAMPLE / "model"), plugins)
            lora = read_lora(EXAMPLE / "loras" / "night.safetensors", checkpoint, NASTY)
            with closing(Remote(Address(worker.address), plugins, Settings())) as remote:
                remote.connect()
                send(remote, lora, fingerprint.structure(checkpoint.spec), Settings(), None)
            yield worker
        finally:
            worker.stop()


def run(*arguments: object) -> Result:
    installed_plugins.cache_clear()
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert_harmless(result.stdout, lines=True)
    return result


def mesh(*arguments: object) -> Result:
    result = run(*arguments)
    assert_harmless(result.stderr, lines=True)
    return result


def test_lists_of_a_worker_s_loras(worker: ThreadWorker) -> None:
    table = mesh("lora", "list", worker.address)
    assert table.exit_code == 0 and len(table.stdout.splitlines()) == 3
    assert "[bold]evil[/bold]" in table.stdout
    listed = json.loads(mesh("lora", "list", worker.address, "--json").stdout)
    assert NASTY in {x["name"] for x in listed}, "a program gets the name as it is"


def test_a_worker_s_errors_and_its_traceback(worker: ThreadWorker) -> None:
    refused = mesh("lora", "rm", worker.address, "nothing")
    assert refused.exit_code == FAILED and "[bold]evil[/bold]" in refused.stderr
    error = RemoteError(f"{NASTY}\n{NASTY}", hint=NASTY, worker=NASTY, remote_traceback=f"{NASTY}\n{NASTY}")
    for options in ([], ["--verbose"]):
        result = CliRunner().invoke(failing(error), [*options, "go"])
        assert result.exit_code == FAILED
        assert_harmless(result.stderr, lines=True)


def test_doctor(worker: ThreadWorker) -> None:
    shown = mesh("doctor", worker.address)
    assert "[bold]evil[/bold]" in shown.stdout and "answers" in shown.stdout


def test_the_table_of_steps(worker: ThreadWorker, tmp_path: Path) -> None:
    size = ("--width", 64, "--height", 64, "--steps", 1, "--device", "cpu", "-o", tmp_path / "x.png")
    made = run("generate", EXAMPLE / "model", "face", "--worker", f"{worker.address}=6:", *size)
    assert made.exit_code == 0, made.output
    assert "[bold]evil[/bold]" in made.stdout
    told = [line for line in made.stderr.splitlines() if "evil" in line]
    assert told, "loading names the worker; the other lines are diffusers' own bars"
    for line in told:
        assert_harmless(line)


def test_known_workers_and_what_a_file_says_of_itself(worker: ThreadWorker, tmp_path: Path) -> None:
    with mesh_home(tmp_path / "home"):
        store = KeyStore()
        store.remember(KnownWorker("10.0.0.1:7777", store.identity().server.public, NASTY))
        assert "[bold]evil[/bold]" in mesh("keys", "list").stdout
        assert "[bold]evil[/bold]" in mesh("keys", "forget", "10.0.0.1:7777").stdout
    file = loras.save(tmp_path / "ink.safetensors", loras.peft({"x_embedder": (256, 16)}), **{"modelspec.title": NASTY})
    assert "[bold]evil[/bold]" in mesh("lora", "inspect", file).stdout


class Terminal(io.StringIO):
    """A terminal of 40 columns, with the encoding of an old one."""

    encoding = "cp1252"

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_moves_the_cursor_to_the_start_of_its_line_and_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    line = LoadingLine()
    line(Activity(NASTY * 9, Phase.LOADING, 1, 2))
    line(Activity("attic", Phase.LOADING, 2, 2))
    blank, first, second = screen.getvalue().split("\r")
    assert blank == "" and len(first) == 39, "what is longer than the terminal is wide could not be written over"
    assert second.startswith("attic: loading 100 %") and len(second.rstrip("\n")) == 39
    assert_harmless(first), assert_harmless(second, lines=True)


def test_a_name_that_the_terminal_s_encoding_lacks_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    terminal.say("屋根裏 ", terminal.Coloured("ü", "red"))
    assert "\\u5c4b\\u6839\\u88cf" in screen.getvalue() and "ü" in screen.getvalue()


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say_json({"name": f"{NASTY}\x7f\u00e4"})
    printed = capsys.readouterr().out
    assert_harmless(printed, lines=True)
    assert json.loads(printed) == {"name": f"{NASTY}\x7f\u00e4"}


def test_the_traceback_of_a_defect() -> None:
    code = (
        "import click, mesh_core.cli as c\n"
        "def fail(): raise ZeroDivisionError(chr(27) + '[2J gone')\n"
        "c.cli.get_command = lambda context, name: click.Command('go', callback=fail)\n"
        "c.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "go"], capture_output=True, text=True)
    assert done.returncode == 1 and r"ZeroDivisionError: \x1b[2J gone" in done.stderr
    assert_harmless(done.stderr, lines=True)
