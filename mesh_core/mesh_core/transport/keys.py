"""Who may talk to whom: this user's own keys, the clients that may use its workers, and the workers it knows.

Knows files and the texts of keys; opens no connection. Keys are CURVE keys as Z85 text of 40 characters. Every file
is JSON, written whole or not at all, readable by the user alone, and read again when another process changed it, so
that a key revoked on the command line is refused by a worker that is already running.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from secrets import token_hex
from time import time
from typing import Literal

from mesh_core.errors import ConfigError, NotAuthorised
from mesh_core.system.config import atomic_write, config_dir
from mesh_core.system.private import check_private
from mesh_core.transport.address import parse_place
from mesh_core.transport.key_table import KeyTable, unreadable

_IDENTITY = "identity.json"
_CLIENTS = "authorised-clients.json"
_INVITES = "invites.json"
_WORKERS = "known-workers.json"
_LONGEST_NAME = 100


@dataclass(frozen=True)
class KeyPair:
    """A public key and the secret that proves it; the secret is never shown."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class UserKeys:
    """A user's two key pairs: one to call workers with, one that its own workers prove."""

    client: KeyPair
    server: KeyPair


@dataclass(frozen=True)
class Client:
    """A key that may use this user's workers; ``added`` is in seconds since 1970."""

    key: str
    name: str
    added: float


@dataclass(frozen=True)
class PendingInvite:
    """An invite that nobody has used yet; ``key`` is public, ``until`` in seconds since 1970."""

    key: str
    name: str
    until: float


@dataclass(frozen=True)
class KnownWorker:
    """A worker that was joined: where (``host:port``), its server key, and its name."""

    address: str
    key: str
    name: str


class KeyStore:
    """The keys in one folder, by default the user's configuration folder. Safe for several processes at once."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder if folder is not None else config_dir()
        self._clients = KeyTable(self._folder / _CLIENTS, Client, "key")
        self._invites = KeyTable(self._folder / _INVITES, PendingInvite, "key")
        self._workers = KeyTable(self._folder / _WORKERS, KnownWorker, "address")
        self._identity: UserKeys | None = None

    def identity(self) -> UserKeys:
        """This user's keys, made on first use.

        Raises:
            ConfigError: the file cannot be read or written, or others may write it.
        """
        if self._identity is None:
            self._identity = _load_keys(self._folder / _IDENTITY)
        return self._identity

    def trust(self, key: str) -> Literal["member", "enrolling"] | None:
        """What a client's key may do here now; None: nothing."""
        if key == self.identity().client.public or key in self._clients.rows():
            return "member"
        invite = self._invites.rows().get(key)
        return "enrolling" if invite is not None and time() < invite.until else None

    def clients(self) -> list[Client]:
        """The authorised clients, without this user's own key."""
        return list(self._clients.rows().values())

    def authorise(self, key: str, name: str) -> None:
        """Let a client's key in from now on. ``name`` is what it calls itself: only what can be printed is kept."""
        printable = "".join(letter for letter in name if letter.isprintable())
        self._clients.put(Client(key, printable[:_LONGEST_NAME], time()))

    def revoke(self, who: str) -> list[Client]:
        """Refuse the clients with this key or name from now on; returns them.

        Raises:
            ConfigError: no client has that key or name.
        """
        found = [c for c in self.clients() if who in (c.key, c.name)]
        if not found:
            known = ", ".join(sorted(c.name or c.key for c in self.clients())) or "none"
            raise ConfigError(
                f"No client has the key or name {who[:80]!r}. Authorised: {known}.", hint="mesh keys list"
            )
        for client in found:
            self._clients.remove(client.key)
        return found

    def invites(self) -> list[PendingInvite]:
        """Invites that are neither used nor expired."""
        return [i for i in self._invites.rows().values() if time() < i.until]

    def invite(self, key: str, name: str, until: float) -> None:
        """Let the public key of an invite in until it enrols a client; forgets expired ones."""
        for old in self._invites.rows().values():
            if old.until <= time():
                self._invites.remove(old.key)
        self._invites.put(PendingInvite(key, name, until))

    def redeem(self, invite_key: str, key: str, name: str) -> None:
        """Use up an invite and authorise ``key``.

        Raises:
            NotAuthorised: the invite is unknown, expired, or another client used it first.
        """
        invite = self._invites.remove(invite_key)
        if invite is None or invite.until <= time():
            raise NotAuthorised("The invite was used already, or has expired.", hint="a new one: mesh keys invite")
        self.authorise(key, name)

    def workers(self) -> list[KnownWorker]:
        """The workers that this user joined."""
        return list(self._workers.rows().values())

    def worker(self, address: str) -> KnownWorker | None:
        """The worker that was joined at ``host:port``."""
        return self._workers.rows().get(address)

    def remember(self, worker: KnownWorker) -> None:
        """Keep a worker's key; replaces what was known of that address."""
        self._workers.put(worker)

    def forget(self, who: str) -> list[KnownWorker]:
        """Drop the workers with this address or name; returns them.

        Raises:
            ConfigError: no known worker has that address or name.
        """
        who = who.strip()
        found = [w for w in self.workers() if who in (w.name, w.address)]
        if not found:
            with suppress(ConfigError):
                place = parse_place(who).netloc
                found = [w for w in self.workers() if w.address == place]
        if not found:
            known = ", ".join(sorted(w.address for w in self.workers())) or "none"
            raise ConfigError(f"No known worker is called {who[:80]!r}. Known: {known}.", hint="mesh keys list")
        for worker in found:
            self._workers.remove(worker.address)
        return found


def _load_keys(path: Path) -> UserKeys:
    check_private(path)
    if not path.exists():
        _create_keys(path)
    try:
        pairs = json.loads(path.read_bytes())
        return UserKeys(KeyPair(**pairs["client"]), KeyPair(**pairs["server"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise unreadable(path, error) from error


def _create_keys(path: Path) -> None:
    """Write new keys unless another process was first: the file appears whole, and only once."""
    from mesh_core.transport.curve import new_key_pair

    pairs = {role: asdict(KeyPair(*new_key_pair())) for role in ("client", "server")}
    draft = path.with_name(f".{path.name}.{token_hex(6)}")
    atomic_write(draft, json.dumps(pairs, indent=1).encode(), private=True)
    try:
        # Both fail when the name is taken; renaming replaces an existing file on POSIX, linking never does.
        os.rename(draft, path) if sys.platform == "win32" else os.link(draft, path)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"Could not write {path}: {error.strerror}.", hint="MESH_HOME on another disk") from error
    finally:
        draft.unlink(missing_ok=True)
