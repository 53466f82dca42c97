"""The built-in ``mesh_register_codecs``: what only processes on one machine can do, and needs more than a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mesh_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from mesh_codec.base import Codec


class CoreCodecs:
    """Imports each codec only when it is registered."""

    @hookimpl
    def mesh_register_codecs(self, register: Callable[[Codec], None]) -> None:
        from mesh_core.crossing.device_codec import DeviceCodec

        register(DeviceCodec())
