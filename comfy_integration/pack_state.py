"""What the nodes of one ComfyUI share: the plugins, what they show, and the sessions that are open.

A session that was closed opens again when its model is sampled, so closing one is never wrong, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from mesh_core.errors import PluginIncompatible

from . import compatibility
from .status import Statuses

if TYPE_CHECKING:
    from mesh_core.host.session import Session
    from mesh_core.model.stored import WeightFormat
    from mesh_core.plugins.registry import Plugins


class PackState:
    """One per ComfyUI process."""

    def __init__(self, send: Callable[[str, Mapping[str, Any]], None]) -> None:
        self.status = Statuses(send)
        self._sessions: WeakValueDictionary[str, Session] = WeakValueDictionary()

    @cached_property
    def message(self) -> str:
        """Why this ComfyUI cannot be used; empty when it can."""
        return compatibility.pack_problem()

    @property
    def plugins(self) -> Plugins:
        """Raises:
        PluginIncompatible: see `message`.
        """
        if self.message:
            raise PluginIncompatible(self.message)
        from mesh_core.builtin import installed_plugins

        return installed_plugins()

    def weight_formats(self) -> Mapping[str, WeightFormat]:
        """The ways to store weights that are read, by name; raises as `plugins`."""
        return self.plugins.weight_formats()

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
        """Have the workers forget what a node opened, if it opened anything."""
        session = self._sessions.get(node)
        if session is not None:
            session.close()


@cache
def pack_state() -> PackState:
    """The pack of this process; its news goes to every open page."""
    from server import PromptServer

    server = PromptServer.instance
    return PackState(lambda event, values: server.send_sync(event, dict(values)))
