"""FLUX.2 for ComfyUI-Mesh: the adapter for FLUX.2 Dev, and the transformer that Klein shares."""

from mesh_flux2.adapter import Flux2Adapter, Variant

__all__ = ["Flux2Adapter", "Variant"]
