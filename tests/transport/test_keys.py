"""The user's keys on disk: made once, kept private, changed by one process and seen by another."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from time import time
from typing import Any

import pytest

from mesh_core.errors import ConfigError, NotAuthorised
from mesh_core.transport import key_table
from mesh_core.transport.curve import from_url_text, new_key_pair, public_of, url_text
from mesh_core.transport.keys import KeyStore, KnownWorker

OWN_KEY = """
import sys
from pathlib import Path
from mesh_core.transport.keys import KeyStore
sys.stdin.readline()
identity = KeyStore(Path(sys.argv[1])).identity()
print(identity.client.public, identity.server.secret)
"""


MANY_KEYS = """
import sys
from pathlib import Path
from mesh_core.transport.keys import KeyStore
sys.stdin.readline()
for count in range(100):
    KeyStore(Path(sys.argv[1])).authorise(f"{sys.argv[2]}-{count}", f"{sys.argv[2]}-{count}")
"""
HOLDER = """
import sys, time
from pathlib import Path
from mesh_core.transport.key_table import _locked
with _locked(Path(sys.argv[1]) / "authorised-clients.json"):
    print("held", flush=True)
    time.sleep(600)
"""


def _process(script: str, *arguments: object) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_start_together_end_with_one_identity(tmp_path: Path) -> None:
    several = [_process(OWN_KEY, tmp_path / "new" / "home") for _ in range(4)]
    for process in several:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=60)[0] for process in several}
    assert len(answers) == 1 and "" not in answers
    assert [path.name for path in (tmp_path / "new" / "home").iterdir()] == ["identity.json"]


def test_the_identity_holds_two_pairs_that_fit_and_shows_no_secret(tmp_path: Path) -> None:
    identity = KeyStore(tmp_path).identity()
    for pair in (identity.client, identity.server):
        assert public_of(pair.secret) == pair.public
        assert pair.secret not in repr(identity)
    assert identity.client != identity.server
    assert KeyStore(tmp_path).identity() == identity


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions; the folder's hold")
def test_files_are_the_users_alone(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "home")
    store.identity()
    store.authorise(new_key_pair()[0], "desk")
    store.invite(new_key_pair()[0], "blue", time() + 60)
    store.remember(KnownWorker("a:1", new_key_pair()[0], "blue"))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "home").iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {0o600}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"client": 1, "server": 2}', '{"client": {"public": "x"}}'])
def test_a_damaged_identity_is_named_and_never_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "identity.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="identity"):
        KeyStore(tmp_path).identity()
    assert path.read_text() == content


def test_a_change_by_another_store_is_seen(tmp_path: Path) -> None:
    running, command = KeyStore(tmp_path), KeyStore(tmp_path)
    key = new_key_pair()[0]
    assert running.trust(key) is None
    command.authorise(key, "desk")
    assert running.trust(key) == "member"
    command.revoke("desk")
    assert running.trust(key) is None
    command.invite(key, "blue", time() + 60)
    assert running.trust(key) == "enrolling"
    assert running.trust(running.identity().client.public) == "member"


def test_an_invite_expires_by_itself(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    late, open_ = new_key_pair()[0], new_key_pair()[0]
    store.invite(late, "blue", time() - 1)
    assert store.trust(late) is None
    with pytest.raises(NotAuthorised, match="expired"):
        store.redeem(late, new_key_pair()[0], "desk")
    store.invite(open_, "blue", time() + 60)
    assert [invite.key for invite in store.invites()] == [open_]
    assert late not in (tmp_path / "invites.json").read_text()


def test_of_many_that_redeem_an_invite_one_succeeds(tmp_path: Path) -> None:
    KeyStore(tmp_path).invite("i" * 40, "blue", time() + 60)
    outcomes: list[str] = []

    def redeem(number: int) -> None:
        try:
            KeyStore(tmp_path).redeem("i" * 40, str(number) * 40, f"host {number}")
            outcomes.append("in")
        except NotAuthorised:
            outcomes.append("refused")

    threads = [threading.Thread(target=redeem, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in"] + ["refused"] * 5
    assert len(KeyStore(tmp_path).clients()) == 1


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for count in range(5):
            KeyStore(tmp_path).authorise(f"{number}-{count}", "x")

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(KeyStore(tmp_path).clients()) == 20


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path: Path) -> None:
    lock = tmp_path / ".authorised-clients.json.lock"
    lock.touch()
    os.utime(lock, (time() - 60, time() - 60))
    KeyStore(tmp_path).authorise("k" * 40, "desk")
    assert not lock.exists()


def test_two_processes_that_write_to_one_table_lose_nothing(tmp_path: Path) -> None:
    several = [_process(MANY_KEYS, tmp_path, name) for name in ("first", "second")]
    for process in several:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in several:
        process.communicate(timeout=60)
        assert process.returncode == 0
    names = {client.name for client in KeyStore(tmp_path).clients()}
    assert names == {f"{name}-{count}" for name in ("first", "second") for count in range(100)}
    assert [path.name for path in tmp_path.iterdir()] == ["authorised-clients.json"]


def test_a_lock_that_another_process_keeps_is_told_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = _process(HOLDER, tmp_path)
    assert holder.stdout.readline() == "held\n"
    try:
        with monkeypatch.context() as patch:
            patch.setattr(key_table, "_WAIT", 0.2)
            with pytest.raises(ConfigError, match=r"authorised-clients\.json locked") as caught:
                KeyStore(tmp_path).authorise("k" * 40, "desk")
        assert "end the mesh command" in caught.value.hint
    finally:
        holder.kill()
        holder.communicate(timeout=60)
    KeyStore(tmp_path).authorise("k" * 40, "desk")
    assert [client.name for client in KeyStore(tmp_path).clients()] == ["desk"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"Could not write to .*file") as caught:
        KeyStore(tmp_path / "file" / "home").authorise("k" * 40, "desk")
    assert "MESH_HOME" in caught.value.hint


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_new_folder_of_keys_is_the_users_alone(tmp_path: Path) -> None:
    KeyStore(tmp_path / "home").authorise("k" * 40, "desk")
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700


def test_names_and_addresses_that_are_not_there_list_what_is(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.authorise("k" * 40, "desk")
    store.remember(KnownWorker("blue:7777", "s" * 40, "blue"))
    with pytest.raises(ConfigError, match="desk"):
        store.revoke("lamp")
    with pytest.raises(ConfigError, match="blue:7777"):
        store.forget("red")
    assert store.forget("mesh://blue:7777")[0].name == "blue"
    assert store.worker("blue:7777") is None


def test_a_hosts_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.authorise("k" * 40, "desk\x1b[2J\n" + "x" * 1000)
    assert store.clients()[0].name.isprintable()
    assert len(store.clients()[0].name) <= 100


def test_a_full_disk_keeps_the_old_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = KeyStore(tmp_path)
    store.authorise("k" * 40, "desk")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        store.authorise("l" * 40, "lamp")
    assert [client.name for client in store.clients()] == ["desk"]
    assert [path.name for path in tmp_path.iterdir()] == ["authorised-clients.json"]
    assert json.loads((tmp_path / "authorised-clients.json").read_text())["version"] == 1


def test_keys_as_url_text() -> None:
    for _ in range(20):
        key = new_key_pair()[0]
        text = url_text(key)
        assert len(text) == 43 and text.replace("-", "").replace("_", "").isalnum()
        assert from_url_text(text) == key
    for wrong in ("", "x", text + "A", text[:-1], text + "=", text.replace(text[0], "ä")):
        with pytest.raises(ValueError):
            from_url_text(wrong)


@pytest.mark.parametrize(
    "row",
    [
        '{"key": 5, "name": "desk", "added": 1.0}',
        '{"key": "k", "name": "desk", "added": "x"}',
        '{"key": "k", "name": "desk"}',
        '{"key": "k", "name": "desk", "added": 1.0, "may": 1}',
        "3",
    ],
)
def test_a_row_that_is_not_understood_is_refused_and_kept(tmp_path: Path, row: str) -> None:
    file = tmp_path / "authorised-clients.json"
    written = f'{{"version": 1, "rows": [{row}]}}'
    file.write_text(written, encoding="utf-8")
    with pytest.raises(ConfigError, match="authorised-clients"):
        KeyStore(tmp_path).clients()
    with pytest.raises(ConfigError, match="authorised-clients"):
        KeyStore(tmp_path).authorise("k" * 40, "desk")
    assert file.read_text("utf-8") == written
