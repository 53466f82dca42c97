"""The table of a worker's sessions: who owns which, and when one is forgotten.

Opening a session is `mesh_core.worker.opening`, computing its steps `mesh_core.worker.steps`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from time import monotonic

from mesh_core import wire
from mesh_core.errors import SessionUnknown, WireTooLarge
from mesh_core.system.config import Settings
from mesh_core.system.logs import logger
from mesh_core.transport.base import Listener, Peer
from mesh_core.worker.executor import Executor, Job
from mesh_core.worker.loras import WorkerLoras
from mesh_core.worker.quota import QUOTA
from mesh_core.worker.replies import Replies
from mesh_core.worker.session import WorkerSession
from mesh_core.worker.stages import StageStore

log = logger(__name__)

_LOOK_EVERY = 0.1
"""Seconds between two looks for hosts that are gone: not with every message, while a step waits to be computed."""


class WorkerSessions:
    """Any thread may look sessions up, add and drop them.

    Iterating gives those that are here now, whatever other threads do meanwhile.

    Args:
        name: of the worker, for errors.
        settings: of them, ``worker`` says when silent sessions end.
        stages, executor, listener, loras: of them, sessions hold stages, jobs, admitted neighbours and LoRAs, which are
            given back when one ends.
    """

    def __init__(
        self, name: str, settings: Settings, stages: StageStore, executor: Executor, listener: Listener,
        loras: WorkerLoras, replies: Replies,
    ) -> None:  # fmt: skip
        self._name, self._settings = name, settings
        self._stages, self._executor, self._listener, self._loras = stages, executor, listener, loras
        self._replies = replies
        self._sessions: dict[bytes, WorkerSession] = {}
        self._lock = threading.Lock()
        self._looked_at = 0.0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[WorkerSession]:
        return iter(list(self._sessions.values()))

    def __contains__(self, session: bytes) -> bool:
        return session in self._sessions

    def owned(self, peer: Peer, session: bytes) -> WorkerSession:
        """The session, if ``peer`` opened it; marks it as seen.

        Raises:
            SessionUnknown: it is not here, or another's.
        """
        found = self._sessions.get(session)
        if found is None or peer.key != found.owner or peer.trust != "member":
            raise self._unknown()
        # Not the route: hosts ping over a connection of its own, and results go where steps come from.
        found.last_seen = monotonic()
        return found

    def fed(self, peer: Peer, session: bytes) -> WorkerSession:
        """The session, if ``peer`` may send it steps: its owner, or an admitted neighbour. Marks it as seen.

        Raises:
            SessionUnknown: it is not here, or closed to ``peer``.
        """
        found = self._sessions.get(session)
        if found is None or (peer.key != found.owner and peer.key not in found.neighbours):
            raise self._unknown()
        # What a neighbour hands on comes from the host too, which need not talk to this worker between steps.
        found.last_seen = monotonic()
        return found

    def seen(self, peer: Peer, session: bytes) -> None:
        """A host is alive and believes to have ``session`` here; b"" if it has none.

        Raises:
            SessionUnknown: it is wrong, since this worker was restarted or forgot the session.
        """
        if session:
            self.owned(peer, session)

    def admit(self, peer: Peer, message: wire.Admit) -> None:
        """Let a neighbouring worker hand over states for a session."""
        neighbours = self.owned(peer, message.session).neighbours
        if len(neighbours | {message.key}) > QUOTA.neighbours:
            raise WireTooLarge(f"{len(neighbours)} neighbours were admitted for one session already.")
        neighbours.add(message.key)
        self._listener.admit(message.key)
        self._replies.send(peer.route, wire.Ok(message.id))

    def put(self, session: WorkerSession) -> None:
        """Take in a session, in the place of an earlier one with its id; of too many of its owner, the most silent
        goes."""
        with self._lock:
            # Looked up only now: an earlier request for the same session may have been served meanwhile.
            old = self._sessions.get(session.id)
            self._sessions[session.id] = session
        if old is not None:
            self._executor.cancel(old.id)
            self._give_back(old)
        theirs = sorted((s for s in self if s.owner == session.owner), key=lambda s: s.last_seen)
        for surplus in theirs[: -QUOTA.sessions]:
            self._drop(surplus)

    def close(self, peer: Peer, message: wire.Close) -> None:
        """Forget a session, as its owner wishes."""
        self._drop(self.owned(peer, message.session))

    def close_all(self) -> None:
        """Forget all sessions; the executor must have stopped."""
        for session in self:
            self._drop(session)
            session.close()

    def stop_orphans(self) -> None:
        """Stop the steps of hosts that went silent, and forget sessions that nobody has used for long."""
        now = monotonic()
        if now < self._looked_at + _LOOK_EVERY:
            return
        self._looked_at, busy = now, self._executor.busy()
        for session in self:
            silent = now - session.last_seen
            if session.id in busy and silent > self._settings.worker.orphaned_after:
                log.info("a host has been silent for %.0f s during its step; the step stops", silent)
                self._executor.cancel(session.id)
        self.forget_silent(self._settings.worker.idle_after)

    def forget_silent(self, seconds: float) -> bool:
        """Forget the sessions that compute nothing and were silent for so long; whether there were any."""
        now, busy = monotonic(), self._executor.busy()
        silent = [s for s in self if s.id not in busy and now - s.last_seen > seconds]
        dropped = [session for session in silent if self._drop(session)]
        return bool(dropped)

    def _drop(self, session: WorkerSession) -> bool:
        """Forget a session unless another thread just did, or opened it anew."""
        with self._lock:
            if self._sessions.get(session.id) is not session:
                return False
            del self._sessions[session.id]
        self._executor.cancel(session.id)
        self._give_back(session)
        return True

    def _give_back(self, session: WorkerSession) -> None:
        self._loras.forget(session)
        self._stages.release(session.loaded)
        for key in session.neighbours:
            if not any(key in s.neighbours for s in self):
                self._listener.dismiss(key)
        if session.next is not None:
            # Not here: the computing thread may be handing a state on, which can take seconds. Under a name of its own,
            # so that neither the session's quota nor its cancelling concerns it.
            closing = b"close" + session.id
            fail = partial(log.warning, "a channel stays open: %s")
            self._executor.submit(Job(closing, 0, session.close, fail, owner=session.owner))

    def _unknown(self) -> SessionUnknown:
        return SessionUnknown(f"{self._name} does not hold that session.")
