"""Entry point ``mesh.v1``: registers the codecs of this package. Must not import mesh_core."""

from __future__ import annotations

from collections.abc import Callable

import pluggy

from mesh_codec.base import Codec

hookimpl = pluggy.HookimplMarker("mesh")


@hookimpl
def mesh_register_codecs(register: Callable[[Codec], None]) -> None:
    """All codecs of this package, the exact ones first."""
    from mesh_codec.ans.nvcomp import NvComp
    from mesh_codec.entropy import EntropyCodec
    from mesh_codec.hevc import HevcCodec
    from mesh_codec.lossless import LosslessCodec
    from mesh_codec.raw import RawCodec

    # What works on this machine is found out once for both.
    on_device = NvComp()
    register(RawCodec())
    register(LosslessCodec(on_device))
    register(EntropyCodec(on_device))
    register(HevcCodec())
