"""CodecError and its kinds.

CodecError
├── CodecUnsupported   the codec, an engine, a dtype or a setting is not available at this end
├── CodecCorrupt       a payload that was not made by the codec, or was damaged on its way
└── CodecStateLost     the decoder lacks the reference that the payload was predicted from: ask for a key frame
"""

from __future__ import annotations

from typing import ClassVar


class CodecError(Exception):
    """Base of all codec errors. ``hint`` is what the reader can do now; left out, it is the kind's ``remedy``."""

    remedy: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = message, hint or self.remedy
        super().__init__(message)

    def __str__(self) -> str:
        return f"{self.message} Try: {self.hint}" if self.hint else self.message


class CodecUnsupported(CodecError):
    """See above; the other end, another codec or another quality may still do."""

    remedy = "another quality or codec"


class CodecCorrupt(CodecError):
    """See above; the stream cannot tell what it was meant to be."""

    remedy = "the same version of comfyui-mesh-codec on both machines"


class CodecStateLost(CodecError):
    """See above; after `mesh_codec.base.Encoder.reset` the next payload needs no reference."""
