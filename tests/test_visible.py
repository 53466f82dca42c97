"""What other machines and files call themselves, as people are shown it."""

from __future__ import annotations

import logging
from io import StringIO

import pytest

from mesh_core import wire
from mesh_core.crossing.stats import HopStats, RunStats, StepStats
from mesh_core.errors import MeshError, PeerLost
from mesh_core.host.progress import Activity, Phase
from mesh_core.system.logs import logger
from mesh_core.system.tables import aligned
from mesh_core.visible import visible, visible_lines, visible_values
from mesh_core.wire.failure import rebuild
from tests.support.foreign import NASTY, assert_harmless


@pytest.mark.parametrize(
    "text",
    ["attic", "Dachboden in Köln", "屋根裏\u3000二号", "чердак", "C:\\models\\a b.safetensors", "[bold]x[/]", "🎨", ""],
)
def test_ordinary_names_stay_as_they_are(text: str) -> None:
    assert visible(text) == text and visible_lines(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x1b[2J\x9b2J\x7f", r"\x1b[2J\x9b2J\x7f"),
        ("a\rb", r"a\rb"),
        ("a\u202eb\u2066c\u200bd\ufeff", r"a\u202eb\u2066c\u200bd\ufeff"),
        ("a\u2028b\x85c", r"a\u2028b\x85c"),
        ("\ud800 \U000e0041", r"\ud800 \U000e0041"),
        ("two\nlines\tand a tab", "two lines and a tab"),
    ],
)
def test_what_a_terminal_acts_on_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_several_lines_keep_their_breaks_and_nothing_else() -> None:
    assert visible_lines("a\r\n\tb\r\x1b[2J") == "a\n\tb\\r\\x1b[2J"


def test_lengths_are_bounded_also_of_what_is_written_out() -> None:
    assert visible("abcdefghij", 8) == "abcde..."
    assert len(visible("\U000e0041" * 10_000_000)) == 4000
    assert len(visible_lines("\n\x1b" * 10_000_000)) == 4000


def test_values_for_a_page_are_made_visible_however_deep() -> None:
    assert visible_values({"a": ["\x1b", {"b": "\r", "n": 1.5}], "c": None}) == {
        "a": ["\\x1b", {"b": "\\r", "n": 1.5}],
        "c": None,
    }


def test_an_error_keeps_what_it_was_told_and_shows_it_visibly() -> None:
    error = MeshError(f"Worker {NASTY} failed.", hint=NASTY)
    assert NASTY in error.message and error.hint == NASTY
    assert_harmless(str(error), lines=True)


@pytest.mark.parametrize("kind", ["RemoteError", "PeerLost", "CodecCorrupt", NASTY])
def test_an_error_of_another_machine_is_harmless_wherever_it_is_printed(kind: str) -> None:
    failed = wire.Failed(1, "", 0, error=kind, message=NASTY, hint=NASTY, worker=NASTY, traceback=NASTY)
    assert_harmless(str(rebuild(failed)), lines=True)


def test_errors_of_a_kind_have_the_kind_s_remedy_and_their_own_before_it() -> None:
    assert "mesh doctor" in PeerLost("attic has not answered for 4.0 s.").hint
    assert PeerLost("gone", hint="wake it").hint == "wake it"


def test_a_record_is_harmless_for_any_handler_and_no_line_of_it_looks_like_a_record() -> None:
    written = StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("12:01 %(message)s"))
    log = logger("mesh_core.test_visible")
    log.addHandler(handler)
    try:
        log.warning("%s is gone: %s", NASTY, f"{NASTY}\n12:02 all is well")
        try:
            raise ValueError(NASTY)
        except ValueError:
            log.exception("it failed")
    finally:
        log.removeHandler(handler)
    lines = written.getvalue().splitlines()
    assert_harmless(written.getvalue(), lines=True)
    assert [line for line in lines if line.startswith("12:")] == [lines[0], "12:01 it failed"]
    assert any("ValueError" in line for line in lines)


def test_tables_and_progress_are_harmless() -> None:
    hop = HopStats(NASTY, NASTY)
    loras = [{"lora": NASTY, "worker": NASTY, "span": "4:8", "action": "sent", "reason": NASTY}]
    run = RunStats([StepStats(0, hops=[hop], codec="raw", reason=NASTY)], loras=loras)
    table = run.table()
    assert_harmless(table, lines=True)
    assert len(table.splitlines()) == 2 + 1 + 2 + 1, "no name adds a line"
    for activity in (Activity(NASTY, Phase.SENDING_LORA, 1, 2, NASTY), Activity.of_worker("w", NASTY, 1, 2)):
        assert_harmless(activity.words)
    assert_harmless(Activity("w", Phase.WAITING, subject=NASTY).words)


def test_a_column_is_as_wide_as_what_is_shown_in_it() -> None:
    assert aligned([["a\x1b", 1], ["b", 20]], left=1) == ["a\\x1b   1", "b      20"]
    assert aligned([["x" * 200]]) == ["x" * 57 + "..."]
