"""The core's own ways to store weights."""

from __future__ import annotations

from collections.abc import Callable

from mesh_core.hookspecs import hookimpl
from mesh_core.model.stored import WeightFormat


class CoreWeightFormats:
    """See `mesh_core.formats`."""

    @hookimpl
    def mesh_register_weight_formats(self, register: Callable[[WeightFormat], None]) -> None:
        """All of them."""
        from mesh_core.formats.gguf import GgufFormat

        register(GgufFormat())
