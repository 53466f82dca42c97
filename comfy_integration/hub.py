"""What the nodes of one ComfyUI share: the plugins, what they show, and the sessions that are open.

A session that was closed opens again when its model is sampled, so closing one is never wrong, only slower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from mesh_core.errors import PluginIncompatible

from . import guard
from .status import Statuses

if TYPE_CHECKING:
    from mesh_core.host.session import Session
    from mesh_core.plugins.registry import Plugins

log = logging.getLogger(__name__)


class Hub:
    """One per ComfyUI process."""

    def __init__(self, send: Callable[[str, Mapping[str, Any]], None]) -> None:
        self.status = Statuses(send)
        self._sessions: WeakValueDictionary[str, Session] = WeakValueDictionary()

    @cached_property
    def message(self) -> str:
        """Why this ComfyUI cannot be used; empty when it can."""
        return guard.check_pack()

    @property
    def plugins(self) -> Plugins:
        """Raises:
        PluginIncompatible: see `message`.
        """
        if self.message:
            raise PluginIncompatible(self.message)
        from mesh_core.builtin import installed_plugins

        return installed_plugins()

    def keep(self, node: str, session: Session) -> None:
        """Note the session of a node; closes the one that it had."""
        before = self._sessions.get(node)
        if before is not None and before is not session:
            before.close()
        self._sessions[node] = session

    def close_others(self, node: str) -> bool:
        """Have workers forget what other nodes opened, to make room; whether there was something to close."""
        others = [session for name, session in list(self._sessions.items()) if name != node]
        for session in others:
            session.close()
        return bool(others)

    def close(self, node: str) -> None:
        session = self._sessions.get(node)
        if session is not None:
            session.close()


@cache
def current() -> Hub:
    """The hub of this process; its news goes to every open page."""
    from server import PromptServer

    server = PromptServer.instance
    return Hub(lambda event, values: server.send_sync(event, dict(values)))
