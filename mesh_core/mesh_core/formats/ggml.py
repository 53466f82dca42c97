"""ggml's blocks as numbers, by the functions of diffusers, which compute as ComfyUI-GGUF does: in half precision.

The library is imported when numbers are first made. It is an extra, since models in other formats need none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

from torch import Tensor

from mesh_core.errors import CheckpointUnrecognised

_NEEDED = ("gguf", "diffusers")

_HINT = 'pip install "comfyui-mesh[gguf]"'

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
    function, size = _functions()[kind]
    return function(blocks, size, blocks.shape[1])


def computed() -> bool:
    """Whether numbers can be made here."""
    try:
        return bool(_functions())
    except CheckpointUnrecognised:
        return False


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
        found = {
            number.name: (function, library.GGML_QUANT_SIZES[number][0])
            for number, function in library.dequantize_functions.items()
        }
    except Exception as error:
        # Its import runs whatever the settings for its own kernels ask for.
        raise CheckpointUnrecognised(f"diffusers' functions for GGUF do not load: {error}.", hint=_HINT) from error
    return found
