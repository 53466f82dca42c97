"""The Klein adapter: FLUX.2's transformer with Klein's data.

Distilled and base models have the same blocks; only a diffusers pipeline folder says which one it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mesh_core.model import CheckpointHeader
from mesh_flux2.adapter import Flux2Adapter, Variant

_DISTILLED = {"num_inference_steps": 4, "guidance_scale": 1.0}
_BASE = {"num_inference_steps": 50, "guidance_scale": 4.0}


class KleinAdapter(Flux2Adapter):
    """FLUX.2 Klein 4B and 9B: no guidance embedding."""

    family: ClassVar[str] = "klein"
    guidance: ClassVar[bool] = False
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("klein-4b", 5, 20, 24, _DISTILLED),
        Variant("klein-9b", 8, 24, 32, _DISTILLED),
    )
    fallback: ClassVar[Mapping[str, Any]] = _DISTILLED

    def _variant(self, config: Mapping[str, Any], header: CheckpointHeader) -> tuple[str, Mapping[str, Any]]:
        name, defaults = super()._variant(config, header)
        if header.pipeline.get("is_distilled") is False:
            return f"{name} base", _BASE
        return name, defaults
