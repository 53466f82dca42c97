"""nvfp4: two 4-bit floats in a byte, a float8 scale for each 16 of them, and a float32 scale for all.

Two programs write it under the same names and in the same types. ComfyUI (comfy-kitchen) has the first number of a
byte in its high bits and the scales in tiles; diffusers and ModelOpt have it in the low bits and the scales row by row.
Which it is follows from what the checkpoint says of itself, never from types. In memory it is one layout for both:

    codes         [rows, columns / 2] uint8, the first number in the high bits
    block_scales  [rows, columns / 16] float8_e4m3fn
    scale         [rows] float32

so that any rows stand alone, and weights with different scales can be joined.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mesh_core.errors import CheckpointUnrecognised
from mesh_core.formats import fused
from mesh_core.formats.arithmetic import in_type, way_and_type
from mesh_core.formats.blocks import check_block_scales, from_tiles, tiled_shape
from mesh_core.formats.companions import SCALAR, claim_layers, companion, matrix, row_scales
from mesh_core.formats.e2m1 import swapped, temporary, unpacked
from mesh_core.formats.markers import CONFIG, bfl_config, marked_layers
from mesh_core.model.stored import Claim, Header, Parts, StoredTensor, WeightFormat

_BLOCK = 16
_LARGEST_E4M3 = 0x7E
_MAGNITUDES = 0x77

KITCHEN = "kitchen/nvfp4-dequant"
"""comfy-kitchen's eager way, which rounds the scales to the type of the numbers as well."""

DIFFUSERS = "diffusers/nvfp4-dequant"
"""In float32, rounded once."""

_MODELOPT_SAYS = frozenset(
    {"quant_method", "quant_algo", "quant_type", "group_size", "producer", "ignore", "config_groups"}
)
"""What ModelOpt notes, of which nothing but the algorithm and the size of blocks says what the numbers are."""


class Nvfp4Format(WeightFormat):
    """One kind, ``E2M1``, for both dialects; in the file, the role of the scales is ``tiles`` or ``block_scales``.

    Either program's arithmetic is possible for either dialect.
    """

    name = "nvfp4"
    rows_in_file = frozenset({"codes", "block_scales"})

    def claim(self, header: Header) -> Claim:
        """Layers that a marker of ComfyUI calls nvfp4, or all that look so where the config says it."""
        marked = marked_layers(header)
        ours = marked.of(self.name).keys()
        config = bfl_config(header) or _modelopt_config(header)
        # A layer that is marked as another format's is that format's.
        looking = _looking_so(header, bool(config)) - (marked.layers.keys() - ours)
        if config and ours:
            raise _either(header, min(ours), "its marker says the one and config.json the other")
        if not config and looking - ours:
            raise _either(header, min(looking - ours), "nothing says which")
        layers = {layer: self._stored(header, layer, tiled=layer in ours) for layer in ours | looking}
        return claim_layers(header, marked, layers, config if layers else ())

    def in_memory(self, stored: StoredTensor, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """From either dialect; what fills up tiles is not looked at."""
        codes, columns = parts["codes"], stored.shape[1]
        if "tiles" in parts:
            role, scales = "tiles", from_tiles(parts["tiles"], start, stop, columns // _BLOCK)
        else:
            role, scales = "block_scales", parts["block_scales"].view(torch.uint8)
            codes = swapped(codes)
        check_block_scales(scales, _LARGEST_E4M3, codes, _MAGNITUDES, stored.parts[role].name)
        return {
            "codes": codes,
            "block_scales": scales.view(torch.float8_e4m3fn),
            "scale": row_scales(stored, parts["scale"], start, stop),
        }

    def nbytes(self, stored: StoredTensor, rows: int) -> int:
        """Codes, a byte for each block, and four for each row."""
        columns = stored.shape[1]
        return rows * (columns // 2 + columns // _BLOCK + 4)

    def arithmetics(self, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """Both programs' dequantisation, everywhere. Matrix units for these numbers are not used."""
        return in_type((KITCHEN, DIFFUSERS), dtype) if kind == "E2M1" else ()

    def dequantise(
        self, parts: Parts, kind: str, shape: tuple[int, ...], dtype: torch.dtype, arithmetic: str
    ) -> Tensor:
        """A look-up, and one product in place."""
        device = parts["codes"].device
        way, made_in = way_and_type(self, kind, arithmetic, (KITCHEN, DIFFUSERS), dtype, device)
        # A product of two types is made in float32 and rounded when it is stored.
        plain = partial(_numbers, dtype=made_in, precision=made_in if way == KITCHEN else torch.float32)
        return fused.numbers("nvfp4" if way == KITCHEN else "nvfp4-once", parts, shape, made_in, plain).to(dtype)

    def transient(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The numbers, and the indices of a look-up or the scales of blocks."""
        count = shape[0] * shape[1]
        return count * dtype.itemsize + max(temporary(count // 2), count // _BLOCK * 4)

    def _stored(self, header: Header, layer: str, tiled: bool) -> StoredTensor:
        codes = matrix(header, f"{layer}.weight", "U8", _BLOCK // 2)
        rows, columns = codes.shape[0], codes.shape[1] * 2
        by_rows = (rows, columns // _BLOCK)
        shape = tiled_shape(*by_rows) if tiled else by_rows
        parts = {
            "codes": codes,
            "tiles" if tiled else "block_scales": companion(header, f"{layer}.weight_scale", ("F8_E4M3",), (shape,)),
            "scale": companion(header, f"{layer}.weight_scale_2", ("F32",), SCALAR),
        }
        return StoredTensor(self, "E2M1", (rows, columns), parts)


def _numbers(parts: Parts, dtype: torch.dtype, precision: torch.dtype) -> Tensor:
    blocks = parts["block_scales"]
    numbers = unpacked(parts["codes"], dtype)
    scales = blocks.to(precision).mul_(parts["scale"][:, None].to(precision))
    numbers.view(*blocks.shape, _BLOCK).mul_(scales[..., None])
    return numbers


def _modelopt_config(header: Header) -> frozenset[str]:
    """The entries of ``config.json`` that say that weights are nvfp4 as ModelOpt writes it."""
    said = header.config.get(CONFIG)
    if not isinstance(said, dict) or said.get("quant_method") != "modelopt" or not said.keys() <= _MODELOPT_SAYS:
        return frozenset()
    named = {said[key] == "NVFP4" for key in ("quant_algo", "quant_type") if key in said}
    return frozenset({CONFIG}) if named == {True} and said.get("group_size", _BLOCK) == _BLOCK else frozenset()


def _looking_so(header: Header, configured: bool) -> set[str]:
    """Layers that have what only nvfp4 has, or where the config says nvfp4, at least codes of that type."""
    tensors = header.tensors
    found = {name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")}
    weights = {name for name, info in tensors.items() if name.endswith(".weight") and info.dtype == "U8"}
    for name in weights:
        layer = name.removesuffix(".weight")
        scales = tensors.get(f"{layer}.weight_scale")
        if configured or (scales is not None and scales.dtype == "F8_E4M3"):
            found.add(layer)
    return found


def _either(header: Header, layer: str, why: str) -> CheckpointUnrecognised:
    return CheckpointUnrecognised(
        f"{header.path}: {layer} could be nvfp4 as ComfyUI writes it or as diffusers and ModelOpt do, with other "
        f"numbers; {why}.",
        hint="ComfyUI's files say it in _quantization_metadata or comfy_quant tensors, folders of diffusers in "
        "config.json under quantization_config",
    )
