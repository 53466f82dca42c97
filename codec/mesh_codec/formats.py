"""Which of the bitstreams that both ends know a codec uses. Must not know any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mesh_codec.errors import CodecUnsupported


def shared_format(codec: str, own: Sequence[str], peer: Mapping[str, Any]) -> str:
    """The first of ``own`` formats that the capabilities ``peer`` have too.

    Raises:
        CodecUnsupported: there is none.
    """
    theirs: Any = peer.get("formats")
    shared = [name for name in own if name in theirs] if isinstance(theirs, list | tuple) else []
    if shared:
        return shared[0]
    raise CodecUnsupported(
        f"The other end's {codec} codec has the formats {str(theirs)[:80]}, this end has {', '.join(own)}.",
        hint="the same version of comfyui-mesh-codec at both ends",
    )
