"""Values that an option cannot mean are refused with a hint, before anything is loaded; no traceback for any."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mesh_core.builtin import installed_plugins
from mesh_core.cli import FAILED, cli
from mesh_core.model.weights import WeightReader
from mesh_core.programs import media
from mesh_core.system.option_types import FiniteNumber
from tests.support import pipelines
from tests.support.workers import mesh_home

TINY_KLEIN = Path(__file__).parents[2] / "examples" / "tiny-klein" / "model"


@pytest.fixture(autouse=True)
def _nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    installed_plugins.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WeightReader, "fill", _never)
    with mesh_home(tmp_path / "home"):
        yield


def _never(*_: object, **__: object) -> None:
    raise AssertionError("weights were read")


def mesh(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], prog_name="mesh")


def refused(result: Result) -> str:
    """The error, of a command that says one and what to try."""
    assert result.exit_code == FAILED, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    *_, error, hint = result.stderr.splitlines()
    assert error.startswith("error: ") and hint.startswith("try: ") and hint != "try: "
    return error


GENERATE = ("generate", TINY_KLEIN, "face", "--local", ":", "--device", "cpu")
HUGE = 10**30


@pytest.mark.parametrize(
    "options",
    [
        *[("--seed", seed) for seed in (-(2**63) - 1, 2**64, HUGE, -HUGE, "1.5", "nan", "")],
        *[("--steps", steps) for steps in (0, -1, 10_001, HUGE, "nan")],
        *[("--guidance", scale) for scale in ("nan", "inf", "-inf", "1e400", "much")],
        *[(side, pixels) for side in ("--width", "--height") for pixels in (0, -16, 15, 16_385, HUGE)],
        *[("--fps", rate) for rate in ("nan", "inf", 0, 241)],
        *[("--frames", frames) for frames in (0, HUGE, 9)],
        *[("--lora", f"night={strength}") for strength in ("nan", "inf", "-inf", "1e400")],
        *[("--device", device) for device in ("meta", "gpu", "cuda:99", "cuda:-1")],
        *[("--local", span) for span in ("12", "5:3", ":99", "a:b", f":{HUGE}")],
        *[("--worker", worker) for worker in ("", "a b", "mesh://", "http://a:1", "::1", f"a:{HUGE}")],
        ("--codec", "nope"),
        ("--variant", "fp16"),
        ("--quality", "best"),
        ("--dtype", "float8_e4m3fn"),
    ],
    ids=lambda options: " ".join(map(str, options))[:40],
)
def test_generate_refuses_what_cannot_be(options: tuple[object, ...]) -> None:
    assert refused(mesh(*GENERATE, *options))
    assert not Path("out.png").exists()


@pytest.mark.parametrize("seed", [-1, 0, -(2**63), 2**64 - 1])
def test_a_seed_may_be_what_torch_takes(seed: int) -> None:
    result = mesh(*GENERATE, "--seed", seed)
    assert isinstance(result.exception, AssertionError), "it went on to read the weights"


@pytest.mark.parametrize(
    "name", ["x.npy", "x.mp4", "x.txt", "x", ".png", "x.palm", "x.hdf5", "x.xbm", "x.blp", "gone/x.png", "taken/x.png"]
)
def test_a_file_that_no_picture_can_be_written_to_is_refused(name: str) -> None:
    Path("taken").write_text("a file where a folder belongs")
    refused(mesh(*GENERATE, "-o", name))
    assert not Path(name).exists()


def test_a_folder_in_place_of_a_file_is_called_one() -> None:
    Path("pictures").mkdir()
    result = mesh(*GENERATE, "-o", "pictures")
    assert "is a folder" in refused(result) and str(Path("pictures") / "out.png") in result.stderr


def test_stats_do_not_replace_the_picture() -> None:
    assert "one file" in refused(mesh(*GENERATE, "-o", "x.png", "--stats", Path.cwd() / "x.png"))


@pytest.mark.parametrize("name", ["x.png", "x.JPG", "x.webp", "x.gif", "x.tiff", "x.bmp"])
def test_pictures_of_the_usual_kinds_are_written(name: str) -> None:
    class Pipeline:
        def __call__(self) -> None: ...

    file = media.checked_output(Path(name), Pipeline)
    media.save(None, type("Output", (), {"images": [Image.new("RGB", (64, 64), "red")]}), {}, file)
    with Image.open(file) as written:
        assert written.size == (64, 64)


@pytest.mark.parametrize("lacking", ["av", "libx264"])
def test_what_a_video_needs_is_told_before_anything_is_loaded(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipeline:
        def __call__(self, num_frames: int = 9) -> None: ...

    import av

    def without(name: str, mode: str) -> Any:
        raise av.codec.codec.UnknownCodecError(name)

    if lacking == "av":
        monkeypatch.setitem(sys.modules, "av", None)
    else:
        monkeypatch.setattr(av, "Codec", without)
    with pytest.raises(media.ConfigError) as told:
        media.checked_output(Path("x.mp4"), Pipeline)
    assert "comfyui-mesh[video]" in told.value.hint


@pytest.mark.parametrize(
    "arguments",
    [
        *[("doctor", "mesh://127.0.0.1:1", "--timeout", t) for t in ("nan", "inf", 0, -1, "1e300")],
        *[("join", "mesh://a?token=x", "--timeout", t) for t in ("nan", "inf", 0, -1, "1e300")],
        *[("keys", "invite", "--minutes", m) for m in ("nan", "inf", 0, -1, "1e300")],
        *[("keys", "invite", "--address", a) for a in ("mesh://", "http://a:1", "a b")],
        *[("inspect", TINY_KLEIN, "--memory", m) for m in ("-1", "nan", "1e9", f"{HUGE}GB")],
        *[("serve", TINY_KLEIN, "--memory", m) for m in ("0", "-1", "nan", f"{HUGE}GB")],
        *[("serve", TINY_KLEIN, "--port", p) for p in (-1, 65536, HUGE)],
        *[("serve", TINY_KLEIN, "--bind", b) for b in ("127.0.0.1:7777", "mesh://a", "a b", "no-such-host.invalid")],
        *[("serve", TINY_KLEIN, "--device", d) for d in ("meta", "gpu")],
        ("serve", TINY_KLEIN, "--lora", "night=nan"),
        *[("bench", "step", "--steps", s) for s in (0, 1, HUGE)],
        *[("bench", "codec", TINY_KLEIN, "--steps", s) for s in (0, -1, HUGE)],
        *[("bench", "codec", TINY_KLEIN, "--cut", c) for c in (-1, 0, 12, 999, HUGE)],
        *[("bench", "codec", TINY_KLEIN, "--size", s) for s in (0, -1, HUGE)],
        *[("bench", "codec", TINY_KLEIN, "--text-tokens", t) for t in (0, -1, HUGE)],
        *[("bench", "codec", TINY_KLEIN, "--prompts", p) for p in (0, 29)],
        *[("bench", "step", "--small", "--save", s) for s in ("taken", "taken/below")],
        *[("lora", "list", a) for a in ("", "a b", "http://a:1", "::1")],
    ],
    ids=lambda arguments: " ".join(str(a).rpartition("/")[2] for a in arguments)[:50],
)
def test_other_commands_refuse_what_cannot_be(arguments: tuple[object, ...]) -> None:
    Path("taken").write_text("a file where a folder belongs")
    if arguments[0] == "doctor" or arguments[:2] == ("lora", "list"):
        # These report what they find.
        result = mesh(*arguments)
        assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.exception
    else:
        refused(mesh(*arguments))


def options_of(command: click.Command, path: str) -> Iterator[tuple[str, click.Parameter]]:
    for param in command.params:
        yield f"{path} {param.opts[0]}", param
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from options_of(found, f"{path} {name}")


def test_every_option_that_is_a_number_has_bounds() -> None:
    found = dict(options_of(cli, "mesh"))
    assert len(found) > 60
    for name, param in found.items():
        assert not isinstance(param.type, (click.types.IntParamType, click.types.FloatParamType)) or (
            isinstance(param.type, (click.IntRange, FiniteNumber))
        ), name


@pytest.mark.parametrize(
    "arguments",
    [("generate", TINY_KLEIN, "a\udcffb"), ("serve", TINY_KLEIN, "--name", "\udcff"), ("keys", "forget", "\udcff")],
    ids=["prompt", "name", "who"],
)
def test_bytes_that_are_no_text_are_refused(arguments: tuple[Any, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mesh_core.cli", *arguments]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == FAILED and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("try: ")


def test_a_name_of_an_invite_is_one_that_its_reader_accepts() -> None:
    result = mesh("keys", "invite", "--name", "a\nb\x1b[31m", "--address", "attic:7801")
    assert result.exit_code == 0
    line = result.stdout.splitlines()[0].removeprefix('mesh join "').removesuffix('"')
    from mesh_core.transport.invites import parse_invite

    assert parse_invite(line).name == "ab[31m"


def test_without_a_size_the_picture_has_the_one_that_the_folder_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = mesh(*GENERATE, "--steps", 1)
    assert result.exit_code == 0, result.output
    with Image.open("out.png") as picture:
        assert picture.size == (128, 128)


def test_what_the_pipeline_does_not_know_is_not_passed_over(tmp_path: Path) -> None:
    pipelines.save(tmp_path / "klein")
    result = mesh("generate", tmp_path / "klein", "face", "--local", ":", "--fps", 24)
    assert "frame_rate" in refused(result)
