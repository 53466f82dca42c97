"""The built-in ``mesh_register_weight_formats``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mesh_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from mesh_core.model.stored import WeightFormat


class CoreWeightFormats:
    """See `mesh_core.formats`. Imports each format only when it is registered."""

    @hookimpl
    def mesh_register_weight_formats(self, register: Callable[[WeightFormat], None]) -> None:
        """All that the core has."""
        from mesh_core.formats.fp8_cast import Fp8CastFormat
        from mesh_core.formats.fp8_row import Fp8RowFormat
        from mesh_core.formats.fp8_scaled import Fp8ScaledFormat
        from mesh_core.formats.gguf import GgufFormat
        from mesh_core.formats.int8 import Int8Format
        from mesh_core.formats.mxfp8 import Mxfp8Format
        from mesh_core.formats.nvfp4 import Nvfp4Format

        for format in (
            Fp8CastFormat(),
            Fp8RowFormat(),
            Fp8ScaledFormat(),
            GgufFormat(),
            Int8Format(),
            Mxfp8Format(),
            Nvfp4Format(),
        ):
            register(format)
