"""Numbers of stored weights on CUDA: by a kernel that reads each code once, where it makes what plain torch makes.

A kernel is tried on each device before it is used there: on rows of the first weight of its kind, beside plain torch.
Where Triton or the compiler that it starts kernels with is missing, or a bit differs, plain torch goes on alone, and a
line in the log says so. The arithmetic's name stays the same: so do the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mesh_codec.exact import as_integers
from mesh_core.model.stored import Parts
from mesh_core.system.logs import logger

log = logger(__name__)

_Kernel = Callable[[Any, Parts, Tensor], None]
"""Calls a function of `mesh_core.formats.kernels`, given as a module, with parts and the numbers to write."""


def _fp8(kernels: Any, parts: Parts, numbers: Tensor, once: bool) -> None:
    kernels.fp8(parts["codes"], parts.get("scale"), numbers, once)


def _nvfp4(kernels: Any, parts: Parts, numbers: Tensor, once: bool) -> None:
    kernels.nvfp4(parts["codes"], parts["block_scales"], parts["scale"], numbers, once)


def _ggml(kernels: Any, parts: Parts, numbers: Tensor, kind: str) -> None:
    kernels.ggml(parts["codes"], kind, numbers)


_KERNELS: Mapping[str, _Kernel] = {
    "fp8": partial(_fp8, once=False),
    "fp8-once": partial(_fp8, once=True),
    "nvfp4": partial(_nvfp4, once=False),
    "nvfp4-once": partial(_nvfp4, once=True),
    **{kind: partial(_ggml, kind=kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")},
}
"""By kind; ``-once`` where scales are not rounded before the product is."""

_TYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})

_TRIED_ROWS = 64

_works: dict[tuple[object, ...], bool] = {}
_said: set[str] = set()
_lock = Lock()


def numbers(
    kind: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, plain: Callable[[Parts], Tensor]
) -> Tensor:
    """The numbers of a weight, [*shape] in ``dtype``, a new tensor on the device of its codes.

    Args:
        kind: of kernel; one that there is not is left to ``plain``.
        parts: as `mesh_core.formats.kernels` takes them; ``scale`` is that of all or has one of each row.
        plain: makes the numbers of parts, or of some rows of all of them, with torch's own operations.
    """
    codes = parts["codes"]
    if kind not in _KERNELS or dtype not in _TYPES or not _suits(parts):
        return plain(parts)
    key = (kind, codes.dtype, dtype, codes.get_device(), *(p.numel() > 1 for p in parts.values()))
    if key not in _works and not _find_out(key, kind, parts, shape, dtype, plain):
        return plain(parts)
    return _made(kind, parts, shape, dtype) if _works[key] else plain(parts)


def _suits(parts: Parts) -> bool:
    codes = parts["codes"]
    # A compiler of whole models fuses by itself.
    if not _on_gpu(codes) or torch.compiler.is_compiling():
        return False
    whole = codes.dim() >= 2 and all(part.is_contiguous() and part.numel() for part in parts.values())
    # Scales inside of codes are read as numbers of two bytes.
    return whole and codes.data_ptr() % 2 == 0


def _on_gpu(codes: Tensor) -> bool:
    return codes.is_cuda


def _find_out(
    key: tuple[object, ...], kind: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype,
    plain: Callable[[Parts], Tensor],
) -> bool:  # fmt: skip
    """Whether the kernel may be used from now on; it is not tried while operations are only recorded."""
    if parts["codes"].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    with _lock:
        if key in _works:
            return _works[key]
        rows = min(shape[0], _TRIED_ROWS)
        some = {role: part[:rows] if part.shape[:1] == shape[:1] else part for role, part in parts.items()}
        reason = ""
        try:
            # Twice: from the second time on a kernel is started in another way (`mesh_codec.ans.launch`).
            made = [_made(kind, some, (rows, *shape[1:]), dtype) for _ in range(2)]
            expected = plain(some)
            if not all(bool(same_bits(one, expected).all()) for one in made):
                reason = f"of {kind} make other bits than plain torch"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Triton may be missing, or a compiler, or what either raises.
            reason = f"do not run: {str(error)[:300] or type(error).__name__}"
        if reason and reason not in _said:
            _said.add(reason)
            log.info("weights are dequantised by plain torch: kernels %s", reason)
        _works[key] = not reason
        return not reason


def _made(kind: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    codes = parts["codes"]
    made = torch.empty(shape[0], prod(shape[1:]), dtype=dtype, device=codes.device)
    # Triton starts kernels on the thread's current device; -1, a CPU, changes nothing.
    with torch.cuda.device(codes.get_device()):
        _KERNELS[kind](_kernels(), parts, made)
    return made.view(shape)


def _kernels() -> Any:
    """Imported when first needed: Triton is not there on every system."""
    from mesh_core.formats import kernels

    return kernels


def same_bits(made: Tensor, expected: Tensor) -> Tensor:
    """Where both are one number, to the bit, or any NaN."""
    return (as_integers(made) == as_integers(expected)) | (made.isnan() & expected.isnan())
