"""HEVC as a codec for tensors: channels as small images on 4:4:4 frames, later tensors of a stream predicted."""

from __future__ import annotations

from mesh_codec.hevc.codec import HevcCodec

__all__ = ["HevcCodec"]
