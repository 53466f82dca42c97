"""FLUX.2 Klein for ComfyUI-Mesh: the architecture of FLUX.2 without a guidance embedding, in its own sizes."""

from mesh_klein.adapter import KleinAdapter

__all__ = ["KleinAdapter"]
