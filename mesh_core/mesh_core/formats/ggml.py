"""ggml's blocks as numbers, by the functions of diffusers, which compute as ComfyUI-GGUF does: in half precision.

The library is imported when numbers are first made. It is an extra, since models in other formats need none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor

from mesh_codec.memory import bytes_of
from mesh_core.errors import CheckpointUnrecognised

_NEEDED = ("gguf", "diffusers")

_HINT = 'pip install "comfyui-mesh[gguf]"'

ARITHMETIC = "ggml/fp16"
"""Scales and numbers in half precision, rounded to the type that is computed in."""

_BITS: Mapping[str, int] = {
    "Q4_0": 0x29036B18,
    "Q4_1": 0x72BB85FA,
    "Q5_0": 0x6B0BAE86,
    "Q5_1": 0x32861D84,
    "Q8_0": 0xB403251C,
    "Q2_K": 0xEC08FA88,
    "Q3_K": 0x8236D019,
    "Q4_K": 0xC47F5EEE,
    "Q5_K": 0x6E05B7F4,
    "Q6_K": 0xF1DB7C7C,
    "IQ4_NL": 0x063F0700,
    "IQ4_XS": 0x18480C6F,
}
"""By kind, the checksum of the numbers of some blocks: it shows whether a library's version computes otherwise."""

_TEMPORARY = {"IQ4_NL": 13, "IQ4_XS": 13}
_TEMPORARY_OF_OTHERS = 10


def temporary(kind: str) -> int:
    """Bytes per number that `blocks_as_numbers` holds at most at a time, its result included."""
    return _TEMPORARY.get(kind, _TEMPORARY_OF_OTHERS)


def require() -> None:
    """Raises:
    CheckpointUnrecognised: what is needed is not installed; says how it is.
    """
    missing = [name for name in _NEEDED if not _there(name)]
    if missing:
        raise CheckpointUnrecognised(
            f"GGUF weights are computed with the packages {' and '.join(_NEEDED)}; {' and '.join(missing)} is missing.",
            hint=_HINT,
        )


def blocks_as_numbers(blocks: Tensor, kind: str) -> Tensor:
    """The numbers in ``blocks``, uint8 [blocks, bytes of one], as [blocks, numbers of one], in half precision (of the
    IQ4 kinds in float32, made of scales in half precision).

    Raises:
        CheckpointUnrecognised: the library is missing, does not load, or does not know that kind.
    """
    functions = _functions()
    if kind not in functions:
        raise CheckpointUnrecognised(
            f"The diffusers that is installed does not compute with GGUF's {kind}.", hint=f"{_HINT} --upgrade"
        )
    function, size = functions[kind]
    return function(blocks, size, blocks.shape[1])


def arithmetic(kind: str, size: int, scales: Sequence[int]) -> str:
    """The name of how the installed library computes, which is `ARITHMETIC` if it makes the bits that are known here.

    Args:
        size: bytes of a block.
        scales: where in it half-precision numbers lie.

    Raises:
        CheckpointUnrecognised: as `blocks_as_numbers`.
    """
    return _arithmetic(kind, size, tuple(scales))


@cache
def _arithmetic(kind: str, size: int, scales: tuple[int, ...]) -> str:
    blocks = (torch.arange(16 * size) * 89 % 251).to(torch.uint8).view(16, size)
    for at in scales:
        blocks[:, at : at + 2] = (torch.arange(1, 17) * 0.0123).half()[:, None].view(torch.uint8)
    bits = crc32(bytes_of(blocks_as_numbers(blocks, kind).float().contiguous()))
    return ARITHMETIC if bits == _BITS.get(kind) else f"{ARITHMETIC}-{bits:08x}"


def _there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


@cache
def _functions() -> dict[str, tuple[Callable[[Tensor, int, int], Tensor], int]]:
    """By kind: makes numbers of blocks, and how many a block holds."""
    require()
    try:
        from diffusers.quantizers.gguf import utils

        library = cast(Any, utils)
        return {
            number.name: (function, library.GGML_QUANT_SIZES[number][0])
            for number, function in library.dequantize_functions.items()
        }
    except Exception as error:
        # Its import runs whatever the settings for its own kernels ask for.
        raise CheckpointUnrecognised(f"diffusers' functions for GGUF do not load: {error}.", hint=_HINT) from error
