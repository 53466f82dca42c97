"""mxfp8: 8-bit floats, and a power of two as the scale of each 32 of them, as ComfyUI (comfy-kitchen) writes it.

In memory:

    codes         [rows, columns] float8_e4m3fn
    block_scales  [rows, columns / 32] uint8, exponents with a bias of 127; 0 is the scale of zeros
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesh_core.formats.arithmetic import in_type, way_and_type
from mesh_core.formats.blocks import check_block_scales, from_tiles, tiled_shape
from mesh_core.formats.companions import claim_layers, companion, matrix
from mesh_core.formats.float8 import E4M3, checked_codes
from mesh_core.formats.markers import marked_layers
from mesh_core.model.stored import Claim, Header, Parts, StoredTensor, WeightFormat

KITCHEN = "kitchen/mxfp8-dequant"
"""comfy-kitchen's: in float32, rounded once."""

_BLOCK = 32
_LARGEST_E8M0 = 254
_MAGNITUDE = 0x7F
_FRACTION_BITS = 23


class Mxfp8Format(WeightFormat):
    """One kind, ``F8_E4M3``."""

    name = "mxfp8"

    def claim(self, header: Header) -> Claim:
        """Layers that a marker of ComfyUI calls mxfp8."""
        marked = marked_layers(header)
        return claim_layers(header, marked, {layer: self._stored(header, layer) for layer in marked.of(self.name)})

    def in_memory(self, stored: StoredTensor, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """What fills up tiles is not looked at."""
        codes = checked_codes(stored, parts["codes"])
        scales = from_tiles(parts["tiles"], start, stop, stored.shape[1] // _BLOCK)
        check_block_scales(scales, _LARGEST_E8M0, codes, _MAGNITUDE, stored.parts["tiles"].name)
        return {"codes": codes, "block_scales": scales}

    def nbytes(self, stored: StoredTensor, rows: int) -> int:
        """Codes, and a byte for each block."""
        columns = stored.shape[1]
        return rows * (columns + columns // _BLOCK)

    def arithmetics(self, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """comfy-kitchen's dequantisation, everywhere. Matrix units for these numbers are not used."""
        return in_type((KITCHEN,), dtype) if kind == E4M3 else ()

    def dequantise(
        self, parts: Parts, kind: str, shape: tuple[int, ...], dtype: torch.dtype, arithmetic: str
    ) -> Tensor:
        """Every 8-bit float is a number of the type as well; one product in place, made in float32 and rounded once."""
        codes, blocks = parts["codes"], parts["block_scales"]
        _, made_in = way_and_type(self, kind, arithmetic, (KITCHEN,), dtype, codes.device)
        numbers = codes.to(made_in)
        scales = (blocks.int() << _FRACTION_BITS).view(torch.float32)
        numbers.view(*blocks.shape, _BLOCK).mul_(scales[..., None])
        return numbers.to(dtype)

    def transient(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The numbers, and the scales twice in four bytes."""
        count = shape[0] * shape[1]
        return count * dtype.itemsize + count // _BLOCK * 8

    def _stored(self, header: Header, layer: str) -> StoredTensor:
        codes = matrix(header, f"{layer}.weight", E4M3, _BLOCK)
        rows, columns = codes.shape
        shape = tiled_shape(rows, columns // _BLOCK)
        tiles = companion(header, f"{layer}.weight_scale", ("U8", "F8_E8M0"), (shape,))
        return StoredTensor(self, E4M3, (rows, columns), {"codes": codes, "tiles": tiles})
