"""The core's own plugins, registered before any installed one. Imports each part only when its hook is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mesh_core.codec_choice import DefaultCodecChoice
from mesh_core.hookspecs import hookimpl
from mesh_core.loras.placement import DefaultLoraPlacement
from mesh_core.plan import DefaultSplit

if TYPE_CHECKING:
    from mesh_core.transport.base import Transport


class CoreTransports:
    """Built-in ``mesh_register_transports``."""

    @hookimpl
    def mesh_register_transports(self, register: Callable[[Transport], None]) -> None:
        from mesh_core.transport.inproc import InprocTransport
        from mesh_core.transport.zeromq import ZeroMqTransport

        register(InprocTransport())
        register(ZeroMqTransport())


def builtin_plugins() -> Mapping[str, object]:
    """New instances of the core's plugins, by name."""
    return {
        "core.transports": CoreTransports(),
        "core.split": DefaultSplit(),
        "core.codec-choice": DefaultCodecChoice(),
        "core.lora-placement": DefaultLoraPlacement(),
    }
