"""LTX-2 and LTX-2.3 for ComfyUI-Mesh: video and audio, two streams through one transformer."""

from mesh_ltx.adapter import LtxAdapter

__all__ = ["LtxAdapter"]
