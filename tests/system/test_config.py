"""Settings and places: what a wrong file tells its owner, and that writing is all or nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mesh_core.errors import ConfigError
from mesh_core.system.config import Settings, atomic_write, cache_dir, config_dir, data_dir, parse_bytes


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_HOME", str(tmp_path))
    monkeypatch.delenv("MESH_DISABLE_PLUGINS", raising=False)
    return tmp_path


def test_one_variable_moves_everything(home: Path) -> None:
    assert {config_dir(), cache_dir(), data_dir()} == {home / "config", home / "cache", home / "data"}


def test_without_a_file_the_defaults_hold_and_nothing_is_public(home: Path) -> None:
    settings = Settings.load()
    assert settings == Settings()
    assert settings.worker.bind == "127.0.0.1"


def test_a_file_overrides_what_it_names_only(home: Path) -> None:
    text = '[worker]\nmemory_budget = "20 GiB"\nport = 0\n[deadlines]\nstep = 5\n[plugins]\ndisabled = ["wan"]\n'
    atomic_write(config_dir() / "config.toml", text.encode())
    settings = Settings.load()
    assert (settings.worker.memory_budget, settings.worker.port) == (20 << 30, 0)
    assert (settings.deadlines.step, settings.deadlines.connect) == (5.0, 10.0)
    assert settings.plugins.disabled == ("wan",)


def test_plugins_can_be_disabled_for_one_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(config_dir() / "config.toml", b'[plugins]\ndisabled = ["wan"]\n')
    monkeypatch.setenv("MESH_DISABLE_PLUGINS", "flux2, klein")
    assert Settings.load().plugins.disabled == ("wan", "flux2", "klein")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[worker]\nprot = 1", "worker.prot is no setting. Try: worker.port"),
        ("[wroker]\nport = 1", "wroker is no setting. Try: worker"),
        ("[worker]\nport = 70000", "worker.port = 70000: a number from 0 to 65535 is expected"),
        ("[worker]\nport = true", "worker.port = True: a whole number is expected"),
        ("[worker]\nbind = 5", "worker.bind = 5: text is expected"),
        ('[worker]\nmemory_budget = "much"', "worker.memory_budget = 'much': 'much' is not a size"),
        ('[deadlines]\nstep = "soon"', "deadlines.step = 'soon': a number is expected"),
        ("[deadlines]\nstep = nan", "deadlines.step = nan: a number of at least 0.1 is expected"),
        ("[heartbeat]\ninterval = 9", "heartbeat.lost_after must be longer"),
        ('[plugins]\ndisabled = "wan"', "plugins.disabled = 'wan': a list of texts is expected"),
        ("worker = 3", "worker is a table"),
        ("[worker\n", "is not TOML"),
    ],
)
def test_a_wrong_file_is_named_with_key_and_reason(home: Path, text: str, told: str) -> None:
    file = home / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Settings.load(file)
    assert told in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_named_file_must_exist(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"Could not read the settings .*none\.toml"):
        Settings.load(home / "none.toml")


@pytest.mark.parametrize(
    ("text", "size"), [("12", 12), ("1.5 GB", 1_500_000_000), ("2gib", 2 << 30), ("3 KiB", 3072), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "GiB", "1 XB", "1e9", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


def test_a_private_file_is_private(home: Path) -> None:
    atomic_write(home / "keys" / "secret", b"s", private=True)
    if os.name == "posix":
        assert stat.S_IMODE((home / "keys" / "secret").stat().st_mode) == 0o600
        assert stat.S_IMODE((home / "keys").stat().st_mode) == 0o700


def test_a_failed_write_leaves_the_old_file_and_no_rest(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "kept"
    atomic_write(file, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"kept: No space left on device\. Try: free some space"):
        atomic_write(file, b"new")
    assert [p.name for p in home.iterdir()] == ["kept"]
    assert file.read_bytes() == b"old"
