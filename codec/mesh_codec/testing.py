"""For codec authors: what a codec must prove, as functions that a test calls. They raise AssertionError.

`check_codec` proves all of it; `CHECKS` are its parts, for a test that names them one by one. Codecs are used as the
ends of a session use them: settings for each quality of the table, negotiated with capabilities like their own; streams
of tensors, some of them empty or of another shape; payloads as they come out of a socket, whole or damaged.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mesh_codec.base import Codec, DecodeLimits, Decoder, Encoded, StreamMemory
from mesh_codec.dtypes import DTYPES, DType
from mesh_codec.errors import CodecCorrupt, CodecError, CodecStateLost, CodecUnsupported
from mesh_codec.memory import bytes_of
from mesh_codec.qualities import QUALITIES, QualityLevel

SHAPES = ((), (1,), (0,), (3, 0, 5), (7,), (1, 1, 129), (3, 67, 5), (70, 6))
"""Of the tensors that every codec is given, for each element type that it carries."""

_TOKENS, _CHANNELS = 160, 48
_MOST_ALLOCATED = 16 << 20
"""Bytes that a decoder may take for a payload of few kilobytes that is refused in the end."""

_FLIPS = 24
"""Payloads with flipped bits, of each buffer."""


def check_codec(codec: Codec) -> None:
    """All of `CHECKS`."""
    for check in CHECKS:
        check(codec)


def check_capabilities(codec: Codec) -> None:
    """Name, capabilities and remedies are plain values that do not change from call to call."""
    assert isinstance(codec.name, str) and codec.name, "the codec has no name"
    assert isinstance(codec.capabilities(), dict) and _plain(codec.capabilities()), "capabilities are not plain values"
    assert codec.capabilities() == codec.capabilities(), "capabilities change from call to call"
    assert all(isinstance(text, str) for remedy in codec.remedies() for text in remedy), "remedies are pairs of texts"


def check_settings(codec: Codec) -> None:
    """Each quality of the table has plain settings that open both ends, or is refused with `CodecUnsupported`; so are
    names outside the table, peers that know nothing of the codec (or they are served), and unknown settings."""
    for level, settings in _offered(codec):
        assert isinstance(settings, dict) and _plain(settings), f"settings for {level.name} are not plain values"
        codec.encoder(settings), codec.decoder(settings)
        for entry in DTYPES:
            bits = codec.estimate(settings, entry.torch).bits
            assert bits is None or bits > 0, f"estimates {bits} bits for {entry.name} at {level.name}"
        for peer in ({}, {"formats": None}, {"formats": ["of another version"]}):
            with _only(CodecUnsupported, f"settings for a peer of {peer}"):
                codec.settings(level.name, peer)
    unknown = {"a setting that nobody has": 1}
    for what, ask in (
        ("a quality that is not in the table", lambda: codec.settings("no such quality", codec.capabilities())),
        ("an encoder's unknown setting", lambda: codec.encoder(unknown)),
        ("a decoder's unknown setting", lambda: codec.decoder(unknown)),
    ):
        with _refused(CodecUnsupported, what):
            ask()


def check_forms(codec: Codec) -> None:
    """Tensors of all shapes arrive with their shape and type, contiguous, by a header of plain values; elements that
    are no floats, or that cross at an exact quality, with all their bits. Types may be refused with
    `CodecUnsupported`, but then in all shapes."""
    for level, settings in _offered(codec):
        carried = 0
        for entry in DTYPES:
            refused = []
            for shape in SHAPES:
                tensor, what = _random(entry, shape), f"{entry.name} {list(shape)} at {level.name}"
                try:
                    coded = codec.encoder(settings).encode(tensor)
                except CodecUnsupported:
                    refused.append(shape)
                    continue
                _check_payload(coded, tensor, what)
                back = codec.decoder(settings).decode(_carried(coded))
                _check_alike(back, tensor, what)
                if level.exact or not entry.lossy:
                    assert _same(back, tensor), f"{what} does not arrive with all its bits"
            assert len(refused) in (0, len(SHAPES)), f"{entry.name} is refused in the shapes {refused} only"
            carried += not refused
        assert carried, f"carries no element type at {level.name}"


def check_strides(codec: Codec) -> None:
    """How a tensor lies in memory does not matter: views decode to the same as their contiguous copies. Tensors that
    hold no data, or not in rows, are refused with `CodecUnsupported`."""
    base = _activations(1)[0]
    wide = torch.cat([base, base], dim=1)
    wide[:, ::2] = base
    views = (base.t(), wide[:, ::2], base[::3], base[:, 5:20], base[0, 0].expand(70, 6), base.clone().requires_grad_())
    for level, settings in _offered(codec):
        for view in views:
            found, expected = (
                codec.decoder(settings).decode(_carried(codec.encoder(settings).encode(tensor)))
                for tensor in (view, view.detach().contiguous().clone())
            )
            assert _same(found, expected), f"strides {view.stride()} change the result at {level.name}"
        for tensor in (torch.zeros(2, 2, device="meta"), torch.eye(2).to_sparse()):
            with _refused(CodecUnsupported, f"a tensor of layout {tensor.layout} on {tensor.device}"):
                codec.encoder(settings).encode(tensor)


def check_input_is_kept(codec: Codec) -> None:
    """Encoding does not change the tensor, and a stream does not depend on what becomes of the tensor afterwards."""
    for level, settings in _offered(codec):
        encoder, decoder, other = codec.encoder(settings), codec.decoder(settings), codec.encoder(settings)
        reading = codec.decoder(settings)
        for tensor in _activations(3):
            mine, before = tensor.clone(), tensor.clone()
            coded = _carried(encoder.encode(mine))
            assert _same(mine, before), f"encoding changes its input at {level.name}"
            mine.fill_(7)
            expected = reading.decode(_carried(other.encode(tensor)))
            assert _same(decoder.decode(coded), expected), f"the stream depends on its input's memory at {level.name}"


def check_streams(codec: Codec) -> None:
    """A stream goes on over empty tensors, other shapes and resets of either end; streams of one codec do not mix; what
    is lost on the way is `CodecStateLost` or harmless, and a key frame goes on."""
    for level, settings in _offered(codec):
        first = _activations(6)
        encoder, decoder = codec.encoder(settings), codec.decoder(settings)
        aside, reading = codec.encoder(settings), codec.decoder(settings)
        for place, tensor in enumerate([*first[:2], first[2][:0], *first[3:], first[0][:70], first[1][:70]]):
            if place == 4:
                encoder.reset()
            if place == 5:
                encoder.reset()
                decoder.reset()
            _check_close(decoder.decode(_carried(encoder.encode(tensor))), tensor, level)
            _check_close(reading.decode(_carried(aside.encode(-tensor))), -tensor, level)
        _check_losses(codec, level, settings)


def _check_losses(codec: Codec, level: QualityLevel, settings: Mapping[str, Any]) -> None:
    tensors = _activations(5)
    encoder, whole = codec.encoder(settings), codec.decoder(settings)
    coded = [_carried(encoder.encode(tensor)) for tensor in tensors]
    expected = [whole.decode(payload) for payload in coded]
    holed = codec.decoder(settings)
    for place in (0, 2, 1, 3):
        with _only(CodecStateLost, f"a payload out of order at {level.name}"):
            found = holed.decode(coded[place])
            assert _same(found, expected[place]), f"what is lost on the way gives another tensor at {level.name}"
    encoder.reset()
    again = encoder.encode(tensors[4])
    for decoder in (holed, codec.decoder(settings)):
        _check_close(decoder.decode(_carried(again)), tensors[4], level)


def check_restoring(codec: Codec) -> None:
    """A stream that goes back to a state gives the same as before, or, where the codec's memory is ``reset``, something
    close. Payloads of streams without memory need no others."""
    for level, settings in _offered(codec):
        memory, tensors = codec.memory(settings), _activations(5)
        assert memory in get_args(StreamMemory), f"memory of {memory!r} at {level.name}"
        encoder, decoder = codec.encoder(settings), codec.decoder(settings)
        for tensor in tensors[:2]:
            decoder.decode(_carried(encoder.encode(tensor)))
        here, there = encoder.state(), decoder.state()
        coded = [_carried(encoder.encode(tensor)) for tensor in tensors[2:4]]
        expected = [decoder.decode(payload) for payload in coded]
        if memory == "none":
            with _only(CodecUnsupported, f"decoding alone what has no memory at {level.name}"):
                assert _same(codec.decoder(settings).decode(coded[1]), expected[1]), "streams have a memory"
        for arrived in range(3):
            for tensor in tensors[:arrived]:
                decoder.decode(_carried(encoder.encode(-tensor)))
            encoder.encode(-tensors[4])
            encoder.restore(here)
            decoder.restore(there)
            found = [decoder.decode(_carried(encoder.encode(tensor))) for tensor in tensors[2:4]]
            for one, wanted, tensor in zip(found, expected, tensors[2:4], strict=True):
                _check_close(one, tensor, level)
                assert memory == "reset" or _same(one, wanted), f"a stream does not go back exactly at {level.name}"


def check_limits(codec: Codec) -> None:
    """A payload over any of the `DecodeLimits` is `CodecCorrupt`; so is one that announces far more than it holds, and
    neither makes the decoder allocate what was announced."""
    tensor = _activations(1)[0]
    for level, settings in _offered(codec):
        coded = _carried(codec.encoder(settings).encode(tensor))
        for limits in (
            DecodeLimits(max_elements=tensor.numel() - 1),
            DecodeLimits(max_bytes=tensor.nbytes - 1),
            DecodeLimits(max_dims=tensor.dim() - 1),
        ):
            with _refused(CodecCorrupt, f"a payload over {limits} at {level.name}"):
                codec.decoder(settings, limits).decode(coded)
        for shape in ([1 << 40, 1 << 40], [1 << 14, 1 << 15], [1 << 29], [1 << 23, 64]):
            huge = Encoded(coded.header | {"shape": shape}, coded.buffers)
            with _small(f"a payload that announces {shape}"), _refused(CodecCorrupt, f"announcing {shape}"):
                codec.decoder(settings).decode(huge)


def check_damage(codec: Codec) -> None:
    """A damaged payload is a `CodecError`, or a tensor of the form that its header announces: at first in a stream and
    later on. Nothing else is ever raised, and the decoder can be used again after a reset of both ends."""
    random = Random(0)
    for level, settings in _offered(codec):
        tensors = _activations(3)
        encoder, decoder = codec.encoder(settings), codec.decoder(settings)
        first, second = (_carried(encoder.encode(tensor)) for tensor in tensors[:2])
        for coded, before in ((first, None), (second, first)):
            for damaged in _damaged(coded, random):
                fresh = codec.decoder(settings)
                if before is not None:
                    fresh.decode(before)
                _check_survives(fresh, damaged, level)
                _check_survives(decoder, damaged, level)
        encoder.reset()
        decoder.reset()
        _check_close(decoder.decode(_carried(encoder.encode(tensors[2]))), tensors[2], level)


CHECKS: tuple[Callable[[Codec], None], ...] = (
    check_capabilities, check_settings, check_forms, check_strides, check_input_is_kept, check_streams, check_restoring,
    check_limits, check_damage,
)  # fmt: skip
"""All that `check_codec` checks."""


def _offered(codec: Codec) -> list[tuple[QualityLevel, dict[str, Any]]]:
    """The settings that the codec has for the qualities of the table, each with the most exact quality it serves."""
    found: list[tuple[QualityLevel, dict[str, Any]]] = []
    for level in QUALITIES:
        with _only(CodecUnsupported, f"settings for {level.name}"):
            settings = codec.settings(level.name, codec.capabilities())
            if all(settings != known for _, known in found):
                found.append((level, settings))
    assert found, "the codec gives no quality of the table"
    return found


def _activations(count: int) -> list[Tensor]:
    """bfloat16 [tokens, channels], each differing from the one before by a tenth of the channels' deviation."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(_TOKENS, _CHANNELS, generator=generator)
    gains = torch.logspace(-1, 1, _CHANNELS)
    found = []
    for _ in range(count):
        found.append(((state + 1) * gains).bfloat16())
        state = state + 0.1 * torch.randn(state.shape, generator=generator)
    return found


def _random(entry: DType, shape: tuple[int, ...]) -> Tensor:
    """Any bits that the type can have; NaN, infinite and subnormal numbers among floats."""
    generator = torch.Generator().manual_seed(1)
    if entry.torch is torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    data = torch.randint(0, 256, (torch.Size(shape).numel() * entry.itemsize,), generator=generator, dtype=torch.uint8)
    return data.view(entry.torch).reshape(shape)


def _carried(coded: Encoded) -> Encoded:
    """As it comes out of a socket: a header of its own, read-only memory."""
    return Encoded(dict(coded.header), [memoryview(bytes(buffer)) for buffer in coded.buffers])


def _damaged(coded: Encoded, random: Random) -> Iterator[Encoded]:
    """Headers that lie, buffers of other sizes, in other numbers, and with some bits the other way round."""
    buffers = [bytes(buffer) for buffer in coded.buffers]
    for key, value in coded.header.items():
        yield Encoded({k: v for k, v in coded.header.items() if k != key}, buffers)
        lies: list[Any] = [None, -1, 1 << 70, True, "x", b"x", [], {}, [1 << 62, 0], float("nan"), 0.0, 0]
        for other in lies:
            if other != value or type(other) is not type(value):
                yield Encoded(coded.header | {key: other}, buffers)
    for shape in ([_TOKENS, _CHANNELS + 1], [_TOKENS + 1, _CHANNELS], [_TOKENS * _CHANNELS], [0], []):
        yield Encoded(coded.header | {"shape": shape}, buffers)
    for dtype in ("float16", "float32", "uint8", "bool", "float31"):
        yield Encoded(coded.header | {"dtype": dtype}, buffers)
    yield Encoded(coded.header, [])
    yield Encoded(coded.header, [*buffers, b""])
    for place, whole in enumerate(buffers):
        for data in (whole[:-1], whole[: len(whole) // 2], whole + b"\0", b"", bytes(len(whole)), "text"):
            yield Encoded(coded.header, [*buffers[:place], data, *buffers[place + 1 :]])  # type: ignore[list-item]
        for _ in range(_FLIPS if whole else 0):
            changed = bytearray(whole)
            for _ in range(random.randint(1, 4)):
                changed[random.randrange(len(whole))] ^= random.randint(1, 255)
            yield Encoded(coded.header, [*buffers[:place], bytes(changed), *buffers[place + 1 :]])


def _check_survives(decoder: Decoder, damaged: Encoded, level: QualityLevel) -> None:
    with _only(CodecError, f"decoding a damaged payload at {level.name}"):
        back = decoder.decode(damaged)
        announced = [damaged.header.get("dtype"), damaged.header.get("shape")]
        found = [str(back.dtype).removeprefix("torch."), list(back.shape)]
        assert found == announced, f"a payload that announces {announced} gives {found} at {level.name}"


def _check_payload(coded: Encoded, tensor: Tensor, what: str) -> None:
    assert _plain(coded.header), f"the header of {what} is not plain values"
    assert coded.header.get("shape") == list(tensor.shape), f"the header of {what} has the shape {coded.header}"
    assert coded.header.get("dtype") == str(tensor.dtype).removeprefix("torch."), f"the header of {what} has no dtype"
    assert all(memoryview(buffer).c_contiguous for buffer in coded.buffers), f"a buffer of {what} is not contiguous"


def _check_alike(back: Tensor, tensor: Tensor, what: str) -> None:
    found, wanted = (back.dtype, back.shape, back.device), (tensor.dtype, tensor.shape, tensor.device)
    assert found == wanted, f"{what} arrives as {found}"
    assert back.is_contiguous(), f"{what} does not arrive contiguous"


def _check_close(back: Tensor, tensor: Tensor, level: QualityLevel) -> None:
    """All bits at an exact quality; else much nearer than the channels' means are."""
    _check_alike(back, tensor, f"a tensor of a stream at {level.name}")
    if level.exact:
        assert _same(back, tensor), f"a stream does not give back all bits at {level.name}"
    elif tensor.numel():
        error = (back.double() - tensor.double()).square().sum()
        spread = (tensor.double() - tensor.double().mean(0)).square().sum()
        assert error < spread / 2, f"a stream is out of step, or useless, at {level.name}"


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal in form and in every bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return bytes_of(one.contiguous()) == bytes_of(other.contiguous())


def _plain(value: object) -> bool:
    """Whether msgpack carries it as it is."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or type(value) in (str, int, float, bool, bytes)


@contextmanager
def _only(kind: type[CodecError], what: str) -> Iterator[None]:
    """What is done inside may raise ``kind``, and nothing else but AssertionError."""
    try:
        yield
    except kind:
        return
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what} raises {type(error).__name__}: {error}") from error


@contextmanager
def _refused(kind: type[CodecError], what: str) -> Iterator[None]:
    """What is done inside has to raise ``kind``."""
    with _only(kind, what):
        yield
        raise AssertionError(f"{what} is not refused")


@contextmanager
def _small(what: str) -> Iterator[None]:
    """What is done inside allocates little: of Python's and numpy's memory in all, and of torch's for any tensor."""
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with _Tensors() as tensors:
            yield
        peak = max(tracemalloc.get_traced_memory()[1] - before, tensors.largest)
    finally:
        if not running:
            tracemalloc.stop()
    assert peak < _MOST_ALLOCATED, f"{what} allocates {peak >> 20} MiB"


class _Tensors(TorchFunctionMode):
    """Sees the memory of every tensor that a function of torch returns in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result
