"""Keys and settings are used only where no other user of the machine can have written them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from mesh_core.errors import ConfigError
from mesh_core.system import private
from mesh_core.system.config import Settings
from mesh_core.transport.keys import KeyStore, KnownWorker


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_HOME", str(tmp_path))
    keys = KeyStore()
    keys.identity()
    keys.remember(KnownWorker("a:1", "k", "studio"))
    (tmp_path / "config" / "config.toml").write_text("[deadlines]\nstep = 7.0\n", encoding="utf-8")
    return tmp_path / "config"


def refused(place: Path) -> AbstractContextManager[object]:
    """Windows keeps no such permissions: those of the profile hold there."""
    return nullcontext() if sys.platform == "win32" else pytest.raises(ConfigError, match=f"can change .*{place.name}")


def known() -> object:
    return KeyStore().workers()


def identity() -> object:
    return KeyStore().identity()


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("", identity),
        ("", known),
        ("", Settings.load),
        ("identity.json", identity),
        ("known-workers.json", known),
        ("config.toml", Settings.load),
    ],
)
def test_what_everybody_may_write_is_not_used(folder: Path, name: str, use: Callable[[], object]) -> None:
    place = folder / name
    before, mode = use(), place.stat().st_mode & 0o777
    place.chmod(mode | 0o002)
    with refused(place) as caught:
        assert use() == before
    if caught is not None:
        assert f"chmod {'700' if place == folder else '600'} {place}" in caught.value.hint  # type: ignore[attr-defined]
    place.chmod(mode)
    assert use() == before


def test_what_a_group_of_several_may_write_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that only this user is in is what some systems give every user; their folders are of that group."""
    folder.chmod(0o770)
    with monkeypatch.context() as alone:
        alone.setattr(private, "_own_group", lambda group: True)
        assert Settings.load().deadlines.step == 7.0
    monkeypatch.setattr(private, "_own_group", lambda group: False)
    with refused(folder):
        assert Settings.load().deadlines.step == 7.0


def test_a_folder_that_others_may_only_read(folder: Path) -> None:
    folder.chmod(0o755)
    (folder / "config.toml").chmod(0o644)
    assert Settings.load().deadlines.step == 7.0 and KeyStore().workers() and KeyStore().identity()
