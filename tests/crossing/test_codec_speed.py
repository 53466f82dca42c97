"""Codecs are timed once per machine; what other machines claim is taken with care."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mesh_codec.base import Encoded, Encoder, Estimate, Quality
from mesh_codec.entropy import EntropyCodec
from mesh_codec.raw import RawCodec
from mesh_core.crossing import speed_book
from mesh_core.crossing.codec_speed import read_speeds
from mesh_core.crossing.codec_timing import sample, time_codec
from mesh_core.crossing.speed_book import SpeedBook
from tests.support.workers import wait_until

CPU = torch.device("cpu")


class Counting(RawCodec):
    """Counts the streams that were opened."""

    name = "counting"

    def __init__(self) -> None:
        self.opened = 0

    def estimate(self, settings: Mapping[str, Any], dtype: torch.dtype) -> Estimate:
        return Estimate(engine="abacus")

    def encoder(self, settings: Mapping[str, Any]) -> Any:
        self.opened += 1
        return super().encoder(settings)


class Broken(RawCodec):
    name = "broken"

    def encoder(self, settings: Mapping[str, Any]) -> Any:
        class Raises(Encoder):
            def encode(self, tensor: torch.Tensor) -> Encoded:
                raise RuntimeError("libwonder.so.3 is missing")

        return Raises()


def test_a_codec_is_timed_once_per_machine(tmp_path: Path) -> None:
    codec = Counting()
    book = SpeedBook(CPU, tmp_path)
    found = book.find(codec, {}, torch.bfloat16)
    timed = codec.opened
    assert timed > 0 and found is not None and found.exact and found.bits == 16
    assert book.find(codec, {}, torch.bfloat16) == found
    assert SpeedBook(CPU, tmp_path).find(codec, {}, torch.bfloat16) == found
    assert codec.opened == timed


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"at": "today"}', '{"at": 1e999}'])
def test_a_damaged_note_is_measured_again(tmp_path: Path, damage: str) -> None:
    SpeedBook(CPU, tmp_path).find(Counting(), {}, torch.bfloat16)
    (note,) = tmp_path.iterdir()
    note.write_text(damage, encoding="utf-8")
    found = SpeedBook(CPU, tmp_path).find(Counting(), {}, torch.bfloat16)
    assert found is not None and found.encode.rate > 1e6


def test_old_notes_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Counting()
    SpeedBook(CPU, tmp_path).find(codec, {}, torch.bfloat16)
    timed, then = codec.opened, speed_book.time()
    monkeypatch.setattr(speed_book, "time", lambda: then + 40 * 86400)
    SpeedBook(CPU, tmp_path).find(codec, {}, torch.bfloat16)
    assert codec.opened > timed


@pytest.mark.parametrize(("load", "again"), [(0.1, False), (1000.0, True)])
def test_what_a_busy_machine_measured_is_soon_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, again: bool
) -> None:
    monkeypatch.setattr(speed_book.psutil, "getloadavg", lambda: (load, load, load))
    codec = Counting()
    SpeedBook(CPU, tmp_path).find(codec, {}, torch.bfloat16)
    timed, then = codec.opened, speed_book.time()
    monkeypatch.setattr(speed_book, "time", lambda: then + 3600)
    SpeedBook(CPU, tmp_path).find(codec, {}, torch.bfloat16)
    assert (codec.opened > timed) is again


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder belongs")
    assert SpeedBook(CPU, tmp_path / "file").find(Counting(), {}, torch.bfloat16) is not None


def test_a_codec_that_fails_is_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    book = SpeedBook(CPU, tmp_path)
    assert book.find(Broken(), {}, torch.bfloat16) is None
    assert "'broken'" in caplog.text and "libwonder" in caplog.text
    assert book.look(Broken(), {}, torch.bfloat16) is None
    book.survey([Broken(), Counting()])
    assert {entry["codec"] for entry in book.plain()} == {"counting"}


def test_looking_does_not_wait_and_has_it_measured(tmp_path: Path) -> None:
    book, codec = SpeedBook(CPU, tmp_path), Counting()
    assert book.look(codec, {}, torch.bfloat16) is None
    wait_until(lambda: book.look(codec, {}, torch.bfloat16) is not None, 20, "the measurement")
    assert SpeedBook(CPU, tmp_path).look(codec, {}, torch.bfloat16) == book.find(codec, {}, torch.bfloat16)


def test_other_settings_of_an_engine_stand_in_for_those_that_are_not_measured_yet(tmp_path: Path) -> None:
    book, codec = SpeedBook(CPU, tmp_path), EntropyCodec()
    balanced, fast = (codec.settings(q, codec.capabilities()) for q in ("balanced", "fast"))  # type: ignore[arg-type]
    found = book.find(codec, balanced, torch.bfloat16)
    assert found is not None and book.look(codec, fast, torch.bfloat16) == found
    wait_until(lambda: book.look(codec, fast, torch.bfloat16) != found, 20, "the measurement")


def test_a_book_that_is_closed_measures_nothing_more(tmp_path: Path) -> None:
    book = SpeedBook(CPU, tmp_path)
    book.close()
    assert book.look(Counting(), {}, torch.bfloat16) is None and book.plain() == []
    book.close()


def test_a_lossy_codec_is_seen_to_be_one(tmp_path: Path) -> None:
    codec = EntropyCodec()
    quality: Quality = "balanced"
    found = time_codec(codec, codec.settings(quality, codec.capabilities()), torch.bfloat16, CPU)
    assert not found.exact and 1 < found.bits < 10
    assert found.encode.seconds(1 << 20) > 0 and found.decode.seconds(1 << 20) > 0


def test_what_a_machine_tells_is_what_another_reads(tmp_path: Path) -> None:
    book = SpeedBook(CPU, tmp_path)
    assert book.plain() == []
    book.survey([Counting(), EntropyCodec()])
    read = read_speeds(book.plain())
    assert read.keys() == {
        ("counting", "abacus"),
        ("entropy", EntropyCodec().estimate({"step": 0.1}, torch.bfloat16).engine),
    }
    found = book.find(Counting(), {}, torch.bfloat16)
    assert found is not None and read["counting", "abacus"].encode == found.encode


def test_the_sample_is_no_harder_than_a_hidden_state() -> None:
    first, second = sample(64, torch.bfloat16, CPU)
    change = (second - first).float().norm() / first.float().norm()
    assert 0.1 < change < 0.5 and first.float().std(dim=0).max() > 10 * first.float().std(dim=0).median()


def _lies() -> Iterator[Any]:
    good = {"codec": "entropy", "engine": "", "encode": [0.0, 1e8], "decode": [0.0, 1e8]}
    yield from (None, "fast", 5, {}, {"entropy": 1e9}, ["entropy"], [None], [{}], [{**good, "codec": 7}])
    for speed in ("1e9", [1e9], [0.0, "1e9"], [0.0, -1e9], [0.0, 0], [-1, 1e9], [0.0, float("nan")], [[], {}], True):
        yield [{**good, "encode": speed}]
        yield [{**good, "decode": speed}]


@pytest.mark.parametrize("said", list(_lies()), ids=str)
def test_nonsense_about_speeds_is_left_out(said: Any) -> None:
    assert read_speeds(said) == {}


def test_boasting_is_taken_within_reason() -> None:
    entry = {"codec": "entropy", "engine": "", "encode": [10**300, 10**300], "decode": [0, 1e-300]}
    (found,) = read_speeds([entry]).values()
    assert all(
        0 <= value < 1e14 for speed in asdict(found).values() if isinstance(speed, dict) for value in speed.values()
    )
    assert found.decode.rate >= 1e4
