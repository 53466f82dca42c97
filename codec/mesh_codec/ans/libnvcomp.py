"""The C interface of nvCOMP 6, its batched ANS coder: the library's functions, with their errors named.

Signatures are those of ``nvcomp/ans.h``, which the library's package brings. All work is put on the stream that is
given; nothing waits for it. Must not know tensors, nor how chunks are laid out in a payload.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char, c_int, c_size_t, c_uint8, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesh_codec.ans.headers import check_headers
from mesh_codec.errors import CodecUnsupported
from mesh_codec.foreign import named

MAJOR = 6
"""Of the interface: structures of another one are laid out otherwise."""

SLACK = 1 << 15
"""Bytes of memory after the last chunk: as many as a part would have if all its symbols were as rare as can be, which
is how far a damaged one makes the decoder read on."""

_Numbers = NDArray[np.int64]
_UCHAR = 1
_STATES_PER_LANE = 1
"""With one state instead of two, 4 % fewer bits in chunks of 128 KiB, in like time; seen on an H100."""

_BACKEND_CUDA = 2
_ERRORS = {10: "invalid value", 12: "cannot decompress", 17: "alignment", 1000: "CUDA error"}


class _Properties(ctypes.Structure):
    _fields_ = (("version", c_uint32), ("cuda", c_uint32))


class _Compress(ctypes.Structure):
    _fields_ = (
        ("type", c_int), ("data_type", c_int), ("sub_chunks", c_uint8), ("states", c_uint8), ("reduction", c_uint8),
        ("reserved", c_char * 53),
    )  # fmt: skip


class _Decompress(ctypes.Structure):
    _fields_ = (
        ("backend", c_int), ("data_type", c_int), ("sub_chunks", c_uint8), ("states", c_uint8),
        ("skip_validate", c_uint8), ("reserved", c_char * 53),
    )  # fmt: skip


_COMPRESS = _Compress(data_type=_UCHAR, states=_STATES_PER_LANE)
_DECOMPRESS = _Decompress(backend=_BACKEND_CUDA, data_type=_UCHAR, states=_STATES_PER_LANE)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "nvcompGetProperties": (POINTER(_Properties),),
    "nvcompBatchedANSCompressGetMaxOutputChunkSize": (c_size_t, _Compress, POINTER(c_size_t)),
    "nvcompBatchedANSCompressGetTempSize": (c_size_t, c_size_t, _Compress, POINTER(c_size_t), c_size_t, c_void_p),
    "nvcompBatchedANSDecompressGetTempSize": (c_size_t, c_size_t, _Decompress, POINTER(c_size_t), c_size_t, c_void_p),
    "nvcompBatchedANSCompressAsync": (
        c_void_p, c_void_p, c_size_t, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p, _Compress, c_void_p, c_void_p,
    ),
    "nvcompBatchedANSDecompressAsync": (
        c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, _Decompress, c_void_p, c_void_p,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Device addresses of arrays with an entry for each chunk; ``coded`` and ``plain`` are arrays of addresses.

    Attributes:
        coded, coded_sizes: of the coded chunks, aligned to 16; sizes in bytes, 8 bytes each.
        plain, plain_sizes: likewise of what is coded.
        statuses: int32; 0 where all went well.
        done_sizes: decoding: of what was made; at most ``plain_sizes``, beyond which nothing is ever written.
        count: chunks.
        largest: bytes of the largest plain chunk.
        scratch, scratch_size: see `NvCompLibrary.scratch`.
    """

    coded: int
    coded_sizes: int
    plain: int
    plain_sizes: int
    statuses: int
    count: int
    largest: int
    done_sizes: int = 0
    scratch: int = 0
    scratch_size: int = 0


class NvCompLibrary:
    """The loaded library.

    Raises:
        CodecUnsupported: it is not installed, or of another version.
    """

    def __init__(self) -> None:
        with named(
            CodecUnsupported,
            "nvCOMP cannot be loaded; try pip install nvidia-libnvcomp-cu13 (or -cu12 with drivers before 580)",
        ):
            self._library: Any = import_module("nvidia.libnvcomp").load_library()
            if self._library is None:
                raise OSError("its package is there, the library in it could not be loaded")
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, c_int
        found = self.version
        if found[0] != MAJOR:
            raise CodecUnsupported(f"nvCOMP {'.'.join(map(str, found))} is installed, not {MAJOR}.")

    @cached_property
    def version(self) -> tuple[int, int, int]:
        """Major, minor and patch."""
        properties = _Properties()
        _check(self._library.nvcompGetProperties(ctypes.byref(properties)))
        return properties.version // 1000, properties.version // 100 % 10, properties.version % 100

    def room(self, largest: int) -> int:
        """Bytes that a chunk of ``largest`` may need when it is coded."""
        size = c_size_t()
        _check(self._library.nvcompBatchedANSCompressGetMaxOutputChunkSize(largest, _COMPRESS, ctypes.byref(size)))
        return size.value

    def scratch(self, count: int, largest: int, stream: int, *, coding: bool) -> int:
        """Bytes of device memory to lend to `compress` (``coding``) or `decompress`."""
        size = c_size_t()
        name, options = ("Compress", _COMPRESS) if coding else ("Decompress", _DECOMPRESS)
        function = getattr(self._library, f"nvcompBatchedANS{name}GetTempSize")
        _check(function(count, largest, options, ctypes.byref(size), count * largest, stream))
        return size.value

    def compress(self, batch: Batch, stream: int) -> None:
        """``plain`` to ``coded``, each with `room`; ``coded_sizes`` are written."""
        b = batch
        _check(
            self._library.nvcompBatchedANSCompressAsync(
                b.plain, b.plain_sizes, b.largest, b.count, b.scratch, b.scratch_size, b.coded, b.coded_sizes,
                _COMPRESS, b.statuses, stream,
            )
        )  # fmt: skip

    def check(self, frame: memoryview, places: _Numbers, sizes: _Numbers, symbols: _Numbers) -> None:
        """Has to come before `decompress`; see `check_headers`."""
        check_headers(frame, places, sizes, symbols)

    def decompress(self, batch: Batch, stream: int) -> None:
        """``coded`` to ``plain``. Damage behind the headers gives other bytes, or a status. There must be `SLACK` bytes
        of memory after the last chunk."""
        b = batch
        _check(
            self._library.nvcompBatchedANSDecompressAsync(
                b.coded, b.coded_sizes, b.plain_sizes, b.done_sizes, b.count, b.scratch, b.scratch_size, b.plain,
                _DECOMPRESS, b.statuses, stream,
            )
        )  # fmt: skip


def _check(status: int) -> None:
    if status:
        raise CodecUnsupported(f"nvCOMP failed with status {status} ({_ERRORS.get(status, 'see nvcompStatus_t')}).")
