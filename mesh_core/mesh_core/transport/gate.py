"""Whom a listener trusts, and how far. Knows keys, not sockets."""

from __future__ import annotations

from mesh_core.errors import ConfigError
from mesh_core.system.logs import logger
from mesh_core.transport.base import Trust
from mesh_core.transport.keys import KeyStore

log = logger(__name__)


class Gate:
    """Which keys a listener trusts, and how far: the user's files, and neighbours that hosts introduced."""

    def __init__(self, keys: KeyStore) -> None:
        self.keys = keys
        self._neighbours: frozenset[str] = frozenset()

    def trust(self, key: str) -> Trust | None:
        """None for a key that may do nothing."""
        try:
            return self.keys.trust(key) or ("neighbour" if key in self._neighbours else None)
        except ConfigError as error:
            log.error("a key was refused because the authorised ones could not be read: %s", error)
            return None

    def open_to(self, key: str) -> bool:
        """Whether the key may connect at all."""
        return self.trust(key) is not None

    def admit(self, key: str) -> None:
        """Trust the key as that of a neighbour, for as long as this listener lives."""
        self._neighbours |= {key}

    def dismiss(self, key: str) -> None:
        """Take an `admit` back; no error if there was none."""
        self._neighbours -= {key}
