from __future__ import annotations

import tracemalloc
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_codec import CodecCorrupt, CodecError, CodecStateLost, Encoded
from mesh_codec.hevc import HevcCodec
from mesh_codec.hevc.bitstream import check_unit
from mesh_codec.hevc.geometry import Geometry
from mesh_codec.payload import crc_of
from mesh_codec.quantiser import Grid

from .structured import activations

CODEC = HevcCodec()
SETTINGS = {"qp": 20}
TENSOR = activations(256, 64, dtype=torch.float32)
LATER = TENSOR + 0.1 * TENSOR.std(0) * torch.randn(TENSOR.shape, generator=torch.Generator().manual_seed(1))
TENSOR[3, 4], TENSOR[3, 5] = torch.nan, 1e30
ENCODER = CODEC.encoder(SETTINGS)
KEY, NEXT = ENCODER.encode(TENSOR), ENCODER.encode(LATER)
BUFFERS = [bytes(b) for b in KEY.buffers]
GEOMETRY = Geometry.of(Grid(64, 256), bits=8)
assert (KEY.header["index"], NEXT.header["index"]) == (0, 1)
TABLE, CHANNELS, PACKETS, OUTLIERS = range(4)


def remade(coded: Encoded, *, header: dict | None = None, **buffers: bytes) -> Encoded:
    """``coded`` with other buffers and a crc_of that matches them, as only a sender can make."""
    names = ("table", "channels", "packets", "outliers")
    parts = tuple(buffers.get(name, bytes(whole)) for name, whole in zip(names, coded.buffers, strict=True))
    return Encoded(coded.header | {"crc": crc_of(parts)} | (header or {}), parts)


def with_packet(coded: Encoded, packet: bytes) -> Encoded:
    return remade(coded, table=len(packet).to_bytes(4, "little"), packets=packet)


def expected() -> torch.Tensor:
    return CODEC.decoder(SETTINGS).decode(KEY).nan_to_num()


def assert_refused(payload: Encoded, kind: type[CodecError] = CodecCorrupt) -> None:
    """By a fresh decoder and by one in the middle of a stream; the next key tensor decodes as ever."""
    for before in ((), (KEY,), (KEY, NEXT)):
        decoder = CODEC.decoder(SETTINGS)
        for coded in before:
            decoder.decode(coded)
        with pytest.raises(kind):
            decoder.decode(payload)
        assert torch.equal(decoder.decode(KEY).nan_to_num(), expected())


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [256, 65]},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": []},
        {"shape": [0]},
        {"dtype": "bfloat16"},
        {"dtype": "int32"},
        {"dtype": None},
        {"step": float("nan")},
        {"step": 1e39},
        {"step": -0.1},
        {"step": None},
        {"outliers": -1},
        {"outliers": 3},
        {"outliers": True},
        {"chain": -1},
        {"chain": 1 << 80},
        {"index": -1},
        {"index": None},
        {"crc": 0},
        {"crc": None},
        {"crc": -1},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_its_buffers(change):
    assert_refused(replace(KEY, header=KEY.header | change))


@pytest.mark.parametrize("missing", sorted(KEY.header))
def test_a_header_without_an_entry(missing):
    assert_refused(replace(KEY, header={k: v for k, v in KEY.header.items() if k != missing}))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("checked", [False, True])
def test_a_buffer_that_is_short_long_empty_missing_or_another(place, checked):
    whole = BUFFERS[place]
    for data in (whole[:-1], whole[: len(whole) // 2], whole + b"\1", b"", BUFFERS[place - 1], whole + whole):
        buffers = [data if i == place else b for i, b in enumerate(BUFFERS)]
        header = KEY.header | ({"crc": crc_of(tuple(buffers))} if checked else {})
        assert_refused(Encoded(header, buffers))
    assert_refused(Encoded(KEY.header, BUFFERS[:place] + BUFFERS[place + 1 :]))


def test_payloads_that_are_swapped_or_replayed():
    decoder = CODEC.decoder(SETTINGS)
    with pytest.raises(CodecStateLost):
        decoder.decode(NEXT)
    decoder.decode(KEY)
    whole = decoder.decode(NEXT)
    with pytest.raises(CodecStateLost):
        decoder.decode(NEXT)
    decoder.decode(KEY)
    assert torch.equal(decoder.decode(NEXT).nan_to_num(), whole.nan_to_num())
    assert_refused(remade(NEXT, header={"chain": 5}), CodecStateLost)
    assert_refused(Encoded(NEXT.header, KEY.buffers))
    assert_refused(Encoded(KEY.header, NEXT.buffers))


@pytest.mark.parametrize("coded", [KEY, NEXT], ids=["key", "predicted"])
def test_a_damaged_picture_is_an_error_and_not_a_concealed_one(coded):
    """Damage inside the slice that a crc_of over the payload does not show: made by the sender, that is."""
    packet = bytes(coded.buffers[PACKETS])
    refused = 0
    for place in range(len(packet) * 6 // 10, len(packet) - 60, max(1, len(packet) // 40)):
        damaged = bytearray(packet)
        damaged[place] ^= 0x55
        decoder = CODEC.decoder(SETTINGS)
        if coded is NEXT:
            decoder.decode(KEY)
        try:
            decoder.decode(with_packet(coded, bytes(damaged)))
        except CodecCorrupt:
            refused += 1
            continue
        raise AssertionError(f"byte {place} of {len(packet)} was damaged unnoticed")
    assert refused >= 8


def test_after_a_damaged_picture_prediction_starts_anew():
    decoder = CODEC.decoder(SETTINGS)
    decoder.decode(KEY)
    packet = bytearray(bytes(NEXT.buffers[PACKETS]))
    packet[len(packet) * 3 // 4] ^= 0xFF
    with pytest.raises(CodecCorrupt):
        decoder.decode(with_packet(NEXT, bytes(packet)))
    with pytest.raises(CodecStateLost):
        decoder.decode(NEXT)
    assert torch.equal(decoder.decode(KEY).nan_to_num(), expected())


def picture(width: int, height: int, layout: str = "yuv444p", count: int = 1) -> bytes:
    """Packets of ``count`` plain pictures."""
    context = av.CodecContext.create("libx265", "w")
    context.width, context.height, context.pix_fmt, context.time_base = width, height, layout, Fraction(1, 25)
    context.options = {"preset": "ultrafast", "tune": "zerolatency", "x265-params": "log-level=none:repeat-headers=1"}
    packets = b""
    for number in range(count):
        frame = av.VideoFrame(width, height, layout)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.pts = number
        packets += b"".join(bytes(p) for p in context.encode(frame))
    return packets


def test_the_helper_makes_what_would_be_let_through():
    check_unit(memoryview(picture(GEOMETRY.width, GEOMETRY.height)), GEOMETRY, key=True)


@pytest.mark.parametrize(
    ("size", "layout", "count"),
    [
        ((2048, 2048), "yuv444p", 1),
        ((160, 144), "yuv444p", 1),
        ((144, 144), "yuv420p", 1),
        ((144, 144), "yuv444p10le", 1),
        ((144, 144), "yuv444p", 3),
    ],
    ids=str,
)
def test_another_picture_than_the_one_that_belongs(size, layout, count):
    assert (GEOMETRY.width, GEOMETRY.height) == (144, 144)
    assert_refused(with_packet(KEY, picture(*size, layout, count)))


def announcing(width: int, height: int) -> bytes:
    """The key packet with a sequence parameter set that announces another size, its bits written anew."""
    packet = bytes(KEY.buffers[PACKETS])
    start = packet.index(b"\x00\x00\x01\x42\x01") + 5
    end = start + len(packet[start : packet.index(b"\x00\x00\x01", start)].rstrip(b"\x00"))
    raw = packet[start:end].replace(b"\x00\x00\x03", b"\x00\x00")
    bits = "".join(f"{byte:08b}" for byte in raw)
    head = 4 + 3 + 1 + 96
    fields = head + len(ue(0)) + len(ue(3)) + 1
    assert bits[fields:].startswith(ue(144) + ue(144))
    bits = bits[:fields] + ue(width) + ue(height) + bits[fields + 2 * len(ue(144)) :]
    bits = bits.rstrip("0")
    data = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    escaped = bytearray()
    for byte in data:
        if escaped.endswith(b"\x00\x00") and byte < 4:
            escaped.append(3)
        escaped.append(byte)
    return packet[:start] + bytes(escaped) + packet[end:]


def ue(number: int) -> str:
    digits = f"{number + 1:b}"
    return "0" * (len(digits) - 1) + digits


def test_a_bitstream_that_announces_a_huge_picture_allocates_nothing():
    assert announcing(144, 144) == bytes(KEY.buffers[PACKETS])
    tracemalloc.start()
    try:
        for size in ((16384, 16384), (1 << 30, 1 << 30), (144, 8192)):
            with pytest.raises(CodecCorrupt, match="announces"):
                CODEC.decoder(SETTINGS).decode(with_packet(KEY, announcing(*size)))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x00" * 64,
        b"\x00\x00\x01",
        b"\x00\x00\x01\x42",
        b"\x00\x00\x01\x42\x01\x01" * 500,
        b"\x00\x00\x01" * 10**6,
        b"\x00\x00\x01\x42\x01\x01" + b"\x00" * 80,
        b"\xff" * 1000,
    ],
    ids=lambda p: f"{p[:8].hex()}-{len(p)}",
)
def test_packets_that_are_no_video(packet):
    with pytest.raises(CodecCorrupt):
        CODEC.decoder(SETTINGS).decode(with_packet(KEY, packet))


def test_ends_with_other_settings_say_so():
    with pytest.raises(CodecCorrupt, match="8/8 bit"):
        CODEC.decoder(SETTINGS | {"bits": 10}).decode(KEY)


@settings(max_examples=200, deadline=None)
@given(
    place=st.integers(0, 3),
    flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=4, unique_by=lambda f: f[0]),
    predicted=st.booleans(),
)
def test_flipped_bytes_with_a_matching_checksum_are_an_error_or_a_tensor_of_the_right_form(place, flips, predicted):
    coded = NEXT if predicted else KEY
    data = bytearray(bytes(coded.buffers[place]))
    for position, mask in flips:
        if data:
            data[position % len(data)] ^= mask
    name = ("table", "channels", "packets", "outliers")[place]
    decoder = CODEC.decoder(SETTINGS)
    decoder.decode(KEY)
    try:
        back = decoder.decode(remade(coded, **{name: bytes(data)}))
    except CodecError:
        return
    assert (back.shape, back.dtype) == (TENSOR.shape, TENSOR.dtype)


def test_without_a_matching_checksum_any_change_is_refused():
    random = np.random.default_rng(0)
    for _ in range(50):
        buffers = [bytearray(b) for b in BUFFERS]
        place = int(random.integers(4))
        buffers[place][random.integers(len(buffers[place]))] ^= 1 << int(random.integers(8))
        with pytest.raises(CodecCorrupt):
            CODEC.decoder(SETTINGS).decode(Encoded(KEY.header, buffers))
