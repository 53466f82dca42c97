"""Weights in the blocks of ggml, as GGUF files and diffusers' GGUF parameters hold them.

A row is a whole number of blocks, each with its own scales, so that the codes are one tensor of bytes and any rows of
it stand alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod

import torch
from torch import Tensor

from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised
from mesh_core.formats import fused, ggml
from mesh_core.model.gguf import DTYPE_PREFIX, QUANTISED, GgufType
from mesh_core.model.stored import Claim, Header, Parts, StoredTensor, TensorInfo, WeightFormat

_SCALES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""By kind that is computed with, where in a block its half-precision scales and offsets lie."""

KINDS: Mapping[int, str] = {t.number: t.name for t in QUANTISED.values() if t.name in _SCALES}
"""The kinds that are computed with, by ggml's number of their type."""

_TYPES: Mapping[str, GgufType] = {t.name: t for t in QUANTISED.values()}

_BF16 = 30
"""ggml's number of bfloat16."""

_AT_ONCE = 1 << 24
"""Numbers that are made at once: the temporaries of more would take more memory than the weight itself."""

_EXPONENT = 0x7C00
"""Of a half-precision number: all of it set in infinities and NaN alone."""


class GgufFormat(WeightFormat):
    """Kinds are ggml's names of types. Parts: ``codes`` U8 [rows, bytes of a row]."""

    name = "gguf"

    def claim(self, header: Header) -> Claim:
        """Every tensor of a quantised type."""
        quantised = [info for info in header.tensors.values() if info.dtype.startswith(DTYPE_PREFIX)]
        if not quantised:
            return Claim()
        version = header.metadata.get("general.quantization_version", "2")
        if version != "2":
            raise CheckpointUnrecognised(
                f"{header.path} has version {version[:20]} of ggml's blocks; version 2 is read.",
                hint="the same model, quantised by a tool of today",
            )
        claim = Claim({info.name: self._stored(header, info) for info in quantised})
        try:
            ggml.require()
        except CheckpointUnrecognised as error:
            raise CheckpointUnrecognised(f"{header.path}: {error.message}", hint=error.hint) from error
        return claim

    def in_memory(self, stored: StoredTensor, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """The codes as they are; their scales are looked at."""
        codes = parts["codes"]
        if codes.shape != (stop - start, _row_bytes(stored.kind, stored.shape)) or codes.dtype != torch.uint8:
            raise CheckpointCorrupt(f"{stored.parts['codes'].name} does not hold the blocks that its shape asks for.")
        if not _finite(codes, stored.kind):
            raise CheckpointCorrupt(f"{stored.parts['codes'].name} has scales that are no finite numbers.")
        return {"codes": codes}

    def held(self, tensor: Tensor) -> tuple[str, tuple[int, ...], Parts] | Tensor | None:
        """diffusers' ``GGUFParameter``, which also wraps numbers in bfloat16."""
        if type(tensor).__name__ != "GGUFParameter" or not hasattr(tensor, "quant_type"):
            return None
        if int(tensor.quant_type) == _BF16:
            return tensor.as_subclass(Tensor).detach().view(torch.bfloat16)
        kind = KINDS.get(int(tensor.quant_type))
        if kind is None:
            return None
        return kind, shape_of(tensor, kind), parts_of(tensor, kind)

    def nbytes(self, stored: StoredTensor, rows: int) -> int:
        """Of whole blocks."""
        return rows * _row_bytes(stored.kind, stored.shape)

    def arithmetics(self, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """One, wherever diffusers and gguf are installed; see `mesh_core.formats.ggml.arithmetic`.

        Raises:
            CheckpointUnrecognised: they are not.
        """
        if kind not in _SCALES or not dtype.is_floating_point:
            return ()
        return (ggml.arithmetic(kind, _TYPES[kind].block_bytes, _SCALES[kind]),)

    def dequantise(
        self, parts: Parts, kind: str, shape: tuple[int, ...], dtype: torch.dtype, arithmetic: str
    ) -> Tensor:
        """See `mesh_core.formats.ggml`."""
        plain = partial(_numbers, kind=kind, shape=shape, dtype=dtype)
        # The kernels make the bits that are known here; a library of others goes on making its own.
        fast = kind if arithmetic == ggml.ARITHMETIC else ""
        return fused.numbers(fast, parts, shape, dtype, plain)

    def transient(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The numbers, and what is held while a part of them is made."""
        columns = prod(shape[1:])
        at_once = min(_rows_at_once(shape), shape[0]) * columns
        return shape[0] * columns * dtype.itemsize + at_once * ggml.temporary(kind)

    def _stored(self, header: Header, info: TensorInfo) -> StoredTensor:
        kind = info.dtype.removeprefix(DTYPE_PREFIX)
        if kind not in _SCALES:
            raise CheckpointUnrecognised(
                f"{header.path} stores {info.name} in ggml's type {kind}, which is not computed with.",
                hint=f"a file in {', '.join(_SCALES)}; Q4_K_M and the like are mixtures of these",
            )
        if len(info.shape) < 2:
            raise CheckpointUnrecognised(
                f"{header.path} stores {info.name}, which is no matrix, in blocks ({kind}).",
                hint="a file that keeps vectors in F32, as the converters for ComfyUI-GGUF and llama.cpp do",
            )
        if prod(info.shape[1:]) % _TYPES[kind].block_size:
            raise CheckpointUnrecognised(
                f"{header.path} stores {info.name} in {kind} blocks that reach over the ends of its rows.",
                hint="a file that keeps this tensor in F16, BF16 or F32",
            )
        rows = info.shape[0]
        codes = TensorInfo(info.name, "U8", (rows, _row_bytes(kind, info.shape)), info.file, info.offset, info.nbytes)
        if prod(codes.shape) != info.nbytes:
            raise CheckpointCorrupt(f"{header.path}: {info.name} does not have the size that its shape asks for.")
        return StoredTensor(self, kind, info.shape, {"codes": codes})


def parts_of(data: Tensor, kind: str) -> Parts:
    """The parts of a weight that a program holds in memory, such as diffusers' ``GGUFParameter``; shares its memory.

    Args:
        data: uint8 [rows, bytes of a row], contiguous or not.
        kind: one of `KINDS`.

    Raises:
        CheckpointUnrecognised: not a kind that is computed with.
        CheckpointCorrupt: not of that form.
    """
    if kind not in _SCALES:
        raise CheckpointUnrecognised(f"Weights in ggml's type {kind} are not computed with.", hint=", ".join(_SCALES))
    # Their tensor classes make what they are of everything that is done to them.
    with torch._C.DisableTorchFunctionSubclass():
        plain = data.detach().as_subclass(Tensor)
    if plain.dtype != torch.uint8 or plain.dim() != 2 or plain.shape[1] % _TYPES[kind].block_bytes:
        raise CheckpointCorrupt(f"A weight in memory does not hold whole {kind} blocks.")
    return {"codes": plain}


def shape_of(data: Tensor, kind: str) -> tuple[int, int]:
    """The shape of the numbers in ``data``, as for `parts_of`."""
    type = _TYPES[kind]
    return data.shape[0], data.shape[1] // type.block_bytes * type.block_size


def _numbers(parts: Parts, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of all rows of ``codes``, of which there may be fewer than in ``shape``."""
    codes = parts["codes"]
    size = _TYPES[kind].block_bytes
    numbers = torch.empty(codes.shape[0], prod(shape[1:]), dtype=dtype, device=codes.device)
    step = _rows_at_once(shape)
    for start in range(0, codes.shape[0], step):
        made = numbers[start : start + step]
        blocks = codes[start : start + step].reshape(-1, size)
        made.copy_(ggml.blocks_as_numbers(blocks, kind).view(made.shape))
    return numbers.view(-1, *shape[1:])


def _row_bytes(kind: str, shape: tuple[int, ...]) -> int:
    type = _TYPES[kind]
    return prod(shape[1:]) // type.block_size * type.block_bytes


def _rows_at_once(shape: tuple[int, ...]) -> int:
    return max(1, _AT_ONCE // max(1, prod(shape[1:])))


def _finite(codes: Tensor, kind: str) -> bool:
    blocks = codes.reshape(-1, _TYPES[kind].block_bytes)
    return not any(
        bool((blocks[:, at : at + 2].contiguous().view(torch.int16) & _EXPONENT == _EXPONENT).any())
        for at in _SCALES[kind]
    )
