"""Messages to frames and back. Frame 0 is a msgpack map, the others are raw buffers. Knows no sockets.

Nothing that arrives is trusted: sizes and lengths first, then the envelope, then the fields that the message's class
has, then what its open maps hold. No object is built from what a peer names but the classes of
`mesh_core.wire.messages`.

A header has one form: what `pack` makes of the message that was read is, byte for byte, what came. So a key that
occurs twice, an unknown key of an entry or a number of another width is refused wherever it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from mesh_core.errors import WireMalformed, WireTooLarge, WireUnsupportedVersion
from mesh_core.wire.lengths import check_lengths
from mesh_core.wire.limits import LIMITS, PROBE_BYTES, MessageLimits
from mesh_core.wire.messages import MESSAGES, Chunk, Message, Probe, Probed, type_name
from mesh_core.wire.plain import check_kinds, check_plain

VERSION = 2
"""The wire version that this package speaks."""

Frame = bytes | bytearray | memoryview

_ENCODER = msgspec.msgpack.Encoder()
_LONGEST_REASON = 300


class _Envelope(msgspec.Struct):
    """What is read first: the version, and the type and the sizes of the buffers as they were written."""

    v: int
    t: msgspec.Raw = msgspec.Raw()
    b: msgspec.Raw = msgspec.Raw()


class _Form(NamedTuple):
    """How one message class is written: ``outer``, type and fields, then ``b``. The encoder begins with ``inner``."""

    kind: type[Message]
    name: str
    outer: bytes
    inner: bytes
    decoder: msgspec.msgpack.Decoder[Message]


def pack(message: Message, buffers: Sequence[Frame] = (), limits: MessageLimits = LIMITS) -> list[Frame]:
    """Frame 0 of ``message``, then ``buffers`` as they are (contiguous memory of any element type; not copied).

    Raises:
        WireMalformed: a field or a buffer that the format cannot carry.
        WireTooLarge: over a limit.
    """
    views = [memoryview(buffer) for buffer in buffers]
    if not all(view.contiguous for view in views):
        raise WireMalformed("A buffer is not contiguous in memory.")
    sizes = [view.nbytes for view in views]
    form = _FORMS[type(message)]
    try:
        written = _ENCODER.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireMalformed(f"A {form.name} message cannot be packed: {error}.") from error
    header = b"".join((form.outer, written[len(form.inner) :], _written_sizes(sizes)))
    _check_sizes(len(header), sizes, limits)
    check_lengths(header, limits)
    read = _read(form, written, limits)
    if read != message:  # a tuple that became a list, or what msgspec writes as something else, such as a set
        check_kinds(msgspec.structs.astuple(message), limits)
    _check_count(read, len(sizes))
    return [header, *buffers]


def unpack(frames: Sequence[Frame], limits: MessageLimits = LIMITS) -> tuple[Message, list[memoryview]]:
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
    header = bytes(first)
    check_lengths(header, limits)
    form = _form_of(header, sizes)
    ending = _written_sizes(sizes)
    if not (header.startswith(form.outer) and header.endswith(ending)):
        raise _misshapen(header, form)
    message = _read(form, form.inner + header[len(form.outer) : -len(ending)], limits)
    _check_count(message, len(sizes))
    return message, [byte_view(view) for view in views]


def check_versions(theirs: Sequence[int]) -> None:
    """Refuse another end that speaks ``theirs``, if this package's version is not among them.

    Raises:
        WireUnsupportedVersion: names both, and the end to update.
    """
    if VERSION not in theirs:
        spoken = ", ".join(map(str, theirs))
        raise WireUnsupportedVersion(
            f"The other end speaks wire version {spoken}, this end speaks version {VERSION}.",
            hint=f"pip install --upgrade comfyui-mesh on {'this' if max(theirs) > VERSION else 'the other'} machine",
        )


def byte_view(buffer: Frame) -> memoryview:
    """The contiguous memory of ``buffer`` as a view of bytes; no copy."""
    view = memoryview(buffer)
    if view.nbytes == 0:
        return memoryview(b"")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _check_sizes(header: int, buffers: list[int], limits: MessageLimits) -> None:
    if header > limits.header:
        raise WireTooLarge(f"A header of {header} bytes is over the limit of {limits.header}.")
    if len(buffers) > limits.buffers:
        raise WireTooLarge(f"{len(buffers)} buffers are over the limit of {limits.buffers}.")
    if buffers and max(buffers) > limits.buffer:
        raise WireTooLarge(f"A buffer of {max(buffers)} bytes is over the limit of {limits.buffer}.")
    if header + sum(buffers) > limits.message:
        raise WireTooLarge(f"A message of {header + sum(buffers)} bytes is over the limit of {limits.message}.")


def _form_of(header: bytes, sizes: list[int]) -> _Form:
    """The form of the type that the envelope names; refuses another version, and sizes other than those that came."""
    try:
        envelope = _ENVELOPES.decode(header)
    except msgspec.ValidationError as error:
        raise WireMalformed(
            f"The header is no map with 'v', 't' and 'b': {_reason(error)}.", hint="the same comfyui-mesh at both ends"
        ) from error
    except (ValueError, RecursionError) as error:
        raise WireMalformed(f"The header is not acceptable msgpack: {_reason(error)}.") from error
    check_versions([envelope.v])
    name = bytes(envelope.t)
    form = _BY_NAME.get(name)
    if form is None:
        raise WireMalformed(f"There is no message type {name[1:65]!r} in wire version {VERSION}.")
    if bytes(envelope.b) != _ENCODER.encode(sizes):
        raise WireMalformed(f"A {form.name} message announces other buffers than the {len(sizes)} that came with it.")
    return form


def _read(form: _Form, written: bytes, limits: MessageLimits) -> Message:
    """The message of which the encoder wrote ``written``: a map of its type and its fields."""
    try:
        message = form.decoder.decode(written)
    except (ValueError, RecursionError) as error:
        raise WireMalformed(f"A {form.name} message is not acceptable: {_reason(error)}.") from error
    if _ENCODER.encode(message) != written:
        raise _not_the_one_form(form)
    check_plain(msgspec.structs.astuple(message), written, limits)
    return message


def _check_count(message: Message, buffers: int) -> None:
    """The buffers must be those that the message's tensors account for; some types have one of their own."""
    tensors: list[dict[str, Any]] | None = getattr(message, "tensors", None)
    if tensors is not None:
        wanted = sum(entry["k"] for entry in tensors)
        if wanted != buffers:
            raise WireMalformed(f"The tensors account for {wanted} buffers, {buffers} came.")
    elif buffers > isinstance(message, (Probe, Probed, Chunk)):
        raise WireMalformed(f"A {type_name(type(message))} message has no buffers, {buffers} came.")
    elif isinstance(message, Chunk) and not buffers:
        raise WireMalformed("A chunk message came without its bytes.")
    elif isinstance(message, Probe) and message.size > PROBE_BYTES:
        raise WireTooLarge(f"probe.size asks for {message.size} bytes, the limit is {PROBE_BYTES}.")


def _misshapen(header: bytes, form: _Form) -> WireMalformed:
    """Why a header does not begin or end as those of its type: the first field that lacks or is unknown, by name."""
    given = msgspec.msgpack.decode(header, type=dict[str, msgspec.Raw]).keys()
    wanted = {"v", "t", *form.kind.__struct_fields__, "b"}
    missing, unknown = sorted(wanted - given), sorted(given - wanted)
    if missing:
        return WireMalformed(f"A {form.name} message lacks {missing[0]!r}.")
    if unknown:
        return WireMalformed(f"A {form.name} message has the unknown field {unknown[0][:64]!r}.")
    return _not_the_one_form(form)


def _not_the_one_form(form: _Form) -> WireMalformed:
    return WireMalformed(
        f"A {form.name} message is not in the form of the format: a key that occurs twice, that its map does not have "
        "or that stands elsewhere, or a number that is of another type or not in its shortest form.",
    )


def _reason(error: Exception) -> str:
    """The decoder's own words, bounded; what they repeat of the message cannot write to a terminal."""
    return ascii(str(error))[1:-1][:_LONGEST_REASON]


def _written_sizes(sizes: list[int]) -> bytes:
    """The end of a header."""
    return b"\xa1b" + _ENCODER.encode(sizes)


def _map_of(entries: int) -> bytes:
    """How a msgpack map of so many entries begins."""
    return bytes([0x80 | entries]) if entries < 16 else b"\xde" + entries.to_bytes(2, "big")


def _form(kind: type[Message]) -> _Form:
    fields = len(kind.__struct_fields__)
    outer = _map_of(fields + 3) + _ENCODER.encode("v") + _ENCODER.encode(VERSION)
    return _Form(kind, type_name(kind), outer, _map_of(fields + 1), msgspec.msgpack.Decoder(kind))


_ENVELOPES = msgspec.msgpack.Decoder(_Envelope)
_FORMS = {kind: _form(kind) for kind in MESSAGES.values()}
_BY_NAME = {_ENCODER.encode(form.name): form for form in _FORMS.values()}
