"""The stages that are loaded in a process, and how many sessions use each."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from time import monotonic

from mesh_core.loras.apply import PatchedModel
from mesh_core.loras.lora import Applied
from mesh_core.model.adapter import Stage
from mesh_core.model.numerics import Numerics
from mesh_core.model.spans import BlockSpan


@dataclass(frozen=True)
class StageKey:
    """What makes two stages the same stage: models with the same weights may compute with them differently.

    Attributes:
        structure, fingerprint: see `mesh_core.model.fingerprint`.
        numerics: in which it computes.
        loras: see `mesh_core.loras.lora.set_key`.
    """

    structure: str
    fingerprint: str
    span: BlockSpan
    numerics: Numerics
    loras: tuple[tuple[str, float, float], ...] = ()


@dataclass
class StageEntry:
    """A stage that is loaded.

    Attributes:
        patched: its parameters, as LoRAs change them.
        loras: those that are merged into it now.
        users: a token of each session that holds it; with none, it may be evicted.
        last_used: time (monotonic) when it was last taken or given back.
    """

    stage: Stage
    patched: PatchedModel
    loras: tuple[Applied, ...] = ()
    users: set[object] = field(default_factory=set)
    last_used: float = field(default_factory=monotonic)


class StageTable:
    """Thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[StageKey, StageEntry] = {}
        self._lock = threading.Lock()

    def __getitem__(self, key: StageKey) -> StageEntry:
        return self._entries[key]

    def items(self) -> list[tuple[StageKey, StageEntry]]:
        """All that are loaded now."""
        with self._lock:
            return list(self._entries.items())

    def users(self) -> dict[StageKey, int]:
        """How many sessions use each."""
        return {key: len(entry.users) for key, entry in self.items()}

    def use(self, key: StageKey, token: object) -> StageEntry | None:
        """The session with ``token`` uses this stage from now on, if it is loaded."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.users.add(token)
                entry.last_used = monotonic()
            return entry

    def used_alone(self, key: StageKey, token: object, other: StageKey) -> StageEntry | None:
        """The stage, if the session with ``token`` alone uses it and it may have the name ``other``, which none has."""
        with self._lock:
            entry = self._entries.get(key)
            return entry if entry is not None and entry.users == {token} and other not in self._entries else None

    def release(self, token: object) -> None:
        """The session with ``token`` no longer uses its stage, which stays loaded. May be called twice."""
        with self._lock:
            for entry in self._entries.values():
                if token in entry.users:
                    entry.users.remove(token)
                    entry.last_used = monotonic()

    def put(self, key: StageKey, entry: StageEntry) -> None:
        """A stage was loaded."""
        with self._lock:
            self._entries[key] = entry

    def remove(self, key: StageKey) -> None:
        """It could not be used after all."""
        with self._lock:
            del self._entries[key]

    def rename(self, before: StageKey, after: StageKey) -> None:
        """It has other LoRAs now."""
        with self._lock:
            self._entries[after] = self._entries.pop(before)

    def evict_for(self, key: StageKey, keep: StageKey | None) -> bool:
        """Drop the idle stage that ``key`` shares least with and that was idle for longest, but not ``keep``; whether
        there was one."""
        with self._lock:
            idle = [
                (k.fingerprint == key.fingerprint, e.last_used, k)
                for k, e in self._entries.items()
                if not e.users and k != keep
            ]
            if idle:
                del self._entries[min(idle, key=lambda item: item[:2])[2]]
            return bool(idle)

    def evict_idle(self) -> None:
        """Drop every stage that nobody uses."""
        with self._lock:
            self._entries = {k: e for k, e in self._entries.items() if e.users}
