"""Messages to frames and back. Frame 0 is a msgpack map, the others are raw buffers. Knows no sockets.

Nothing that arrives is trusted: sizes first, then msgpack with bounds, then plain values, then the message's own
fields. No object is built from what a peer names but the message classes of `mesh_core.wire.messages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack

from mesh_core.errors import WireMalformed, WireTooLarge, WireUnsupportedVersion
from mesh_core.wire.limits import LIMITS, Limits
from mesh_core.wire.messages import MESSAGES, Message
from mesh_core.wire.schema import check_keys, check_plain, fields_of

VERSION = 1
"""The wire version that this package speaks."""

Frame = bytes | bytearray | memoryview

_WITH_ONE_BUFFER = frozenset({"Probe", "Probed", "Chunk"})
_ENVELOPE = frozenset({"v", "t", "b"})
_CHECKS = {kind: fields_of(kind) for kind in MESSAGES.values()}


def pack(message: Message, buffers: Sequence[Frame] = (), limits: Limits = LIMITS) -> list[Frame]:
    """Frame 0 of ``message``, then ``buffers`` as they are (contiguous memory of any element type; not copied).

    Raises:
        WireMalformed: a field or a buffer that the format cannot carry.
        WireTooLarge: over a limit.
    """
    views = [memoryview(buffer) for buffer in buffers]
    if not all(view.contiguous for view in views):
        raise WireMalformed("A buffer is not contiguous in memory.")
    sizes = [view.nbytes for view in views]
    kind = type(message).__name__.lower()
    fields = dict(vars(message))
    header = {"v": VERSION, "t": kind, **fields, "b": sizes}
    check_plain(header, limits)
    _check_fields(type(message), fields, kind)
    _check_count(message, len(sizes))
    try:
        packed: bytes = msgpack.packb(header, use_bin_type=True)
    except (ValueError, UnicodeEncodeError) as error:
        raise WireMalformed(f"A {kind} message cannot be packed: {error}.") from error
    _check_sizes(len(packed), sizes, limits)
    return [packed, *buffers]


def unpack(frames: Sequence[Frame], limits: Limits = LIMITS) -> tuple[Message, list[memoryview]]:
    """The message and its buffers, as views of bytes of the frames' own memory.

    Raises:
        WireMalformed: not a message of this format.
        WireTooLarge: over a limit.
        WireUnsupportedVersion: of another wire version.
    """
    if not frames:
        raise WireMalformed("A message without frames.")
    first, *views = (memoryview(frame) for frame in frames)
    sizes = [view.nbytes for view in views]
    _check_sizes(first.nbytes, sizes, limits)
    header = _read_header(first, limits)
    kind = _check_envelope(header, sizes)
    fields = {name: value for name, value in header.items() if name not in _ENVELOPE}
    _check_fields(kind, fields, header["t"])
    message = kind(**fields)
    _check_count(message, len(sizes))
    return message, [byte_view(view) for view in views]


def byte_view(buffer: Frame) -> memoryview:
    """The contiguous memory of ``buffer`` as a view of bytes; no copy."""
    view = memoryview(buffer)
    if view.nbytes == 0:
        return memoryview(b"")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _check_sizes(header: int, buffers: list[int], limits: Limits) -> None:
    if header > limits.header:
        raise WireTooLarge(f"A header of {header} bytes is over the limit of {limits.header}.")
    if len(buffers) > limits.buffers:
        raise WireTooLarge(f"{len(buffers)} buffers are over the limit of {limits.buffers}.")
    if buffers and max(buffers) > limits.buffer:
        raise WireTooLarge(f"A buffer of {max(buffers)} bytes is over the limit of {limits.buffer}.")
    if header + sum(buffers) > limits.message:
        raise WireTooLarge(f"A message of {header + sum(buffers)} bytes is over the limit of {limits.message}.")


def _read_header(frame: memoryview, limits: Limits) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_without_duplicates,
            max_str_len=limits.text,
            max_bin_len=limits.text,
            max_array_len=limits.items,
            max_map_len=limits.items,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        # msgpack has one class for both; the text is the only difference.
        kind = WireTooLarge if "exceeds max_" in str(error) else WireMalformed
        raise kind(f"The header is not acceptable msgpack: {error}.") from error
    if type(header) is not dict:
        raise WireMalformed("The header is not a map.")
    version = header.get("v")
    if type(version) is int and version != VERSION:
        raise _other_version(version)
    check_plain(header, limits)
    return header


def _without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    read = dict(pairs)
    if len(read) != len(pairs):
        raise ValueError("a key occurs twice in one map")
    return read


def _check_envelope(header: dict[str, Any], sizes: list[int]) -> type[Message]:
    if not header.keys() >= _ENVELOPE or type(header["v"]) is not int:
        raise WireMalformed("The header lacks one of 'v', 't' and 'b'.", hint="the same comfyui-mesh at both ends")
    kind = header["t"]
    if type(kind) is not str or kind not in MESSAGES:
        raise WireMalformed(f"There is no message type {str(kind)[:64]!r} in wire version {VERSION}.")
    if header["b"] != sizes or any(type(size) is not int for size in header["b"]):
        raise WireMalformed(f"A {kind} message announces other buffers than the {len(sizes)} that came with it.")
    return MESSAGES[kind]


def _check_fields(kind: type[Message], fields: dict[str, Any], where: str) -> None:
    checks = _CHECKS[kind]
    check_keys(fields, checks.keys(), where)
    for name, check in checks.items():
        check(fields[name], f"{where}.{name}")


def _check_count(message: Message, buffers: int) -> None:
    """The buffers must be those that the message's tensors account for; some types have one of their own."""
    entries = getattr(message, "tensors", ())
    wanted = sum(entry["k"] for entry in entries)
    kind = type(message).__name__
    if "tensors" in vars(message) and wanted != buffers:
        raise WireMalformed(f"The tensors account for {wanted} buffers, {buffers} came.")
    if "tensors" not in vars(message) and buffers > int(kind in _WITH_ONE_BUFFER):
        raise WireMalformed(f"A {kind.lower()} message has no buffers, {buffers} came.")
    if kind == "Chunk" and buffers != 1:
        raise WireMalformed("A chunk message came without its bytes.")


def _other_version(theirs: int) -> WireUnsupportedVersion:
    newer = theirs > VERSION
    return WireUnsupportedVersion(
        f"The other end speaks wire version {theirs}, this end speaks version {VERSION}.",
        hint=f"pip install --upgrade comfyui-mesh on {'this' if newer else 'the other'} machine",
    )
