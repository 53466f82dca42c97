from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_codec import CodecCorrupt, CodecError, Encoded, EntropyCodec

from .structured import activations

CODEC = EntropyCodec()
SETTINGS = {"step": 0.2}
TENSOR = activations(512, 96, dtype=torch.float32)
TENSOR[3, 4], TENSOR[3, 5], TENSOR[400, 0] = torch.nan, 1e30, torch.inf
CODED = CODEC.encoder(SETTINGS).encode(TENSOR)
DECODED = CODEC.decoder(SETTINGS).decode(CODED)
BUFFERS = [bytes(b) for b in CODED.buffers]
TABLE, CHANNELS, PIECES, OUTLIERS = range(4)


def replaced(place: int, data: bytes) -> list[bytes]:
    return [data if i == place else b for i, b in enumerate(BUFFERS)]


def squeezed(data: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def one_piece(method: int, frames: list[bytes], rare: int = 0, gap_bytes: int = 0) -> list[bytes]:
    """The buffers of a key frame of one piece, by hand."""
    numbers = [*map(len, frames), rare, gap_bytes]
    table = bytes([method]) + b"".join(n.to_bytes(4, "little") for n in numbers)
    return [table, BUFFERS[CHANNELS], b"".join(frames), BUFFERS[OUTLIERS]]


def outliers(gaps: list[int]) -> bytes:
    planes = np.array(gaps, dtype="<u4").view(np.uint8).reshape(-1, 4).T.tobytes()
    return squeezed(planes + bytes(4 * len(gaps)))


def assert_refused(header: dict, buffers: list) -> None:
    decoder = CODEC.decoder(SETTINGS)
    with pytest.raises(CodecCorrupt):
        decoder.decode(Encoded(header, buffers))
    assert torch.equal(decoder.decode(CODED).nan_to_num(), DECODED.nan_to_num())


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [512, 97]},
        {"shape": [96, 512]},
        {"shape": [512 * 96, 1, 1, 1, 1, 1, 1, 1, 1]},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": []},
        {"shape": [0]},
        {"dtype": "bfloat16"},
        {"dtype": "int32"},
        {"dtype": None},
        {"step": float("nan")},
        {"step": float("inf")},
        {"step": 1e39},
        {"step": -0.1},
        {"step": 1},
        {"step": None},
        {"outliers": -1},
        {"outliers": 2},
        {"outliers": 0},
        {"outliers": 1 << 70},
        {"outliers": True},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_its_buffers(change):
    assert_refused(CODED.header | change, BUFFERS)


@pytest.mark.parametrize("missing", ["dtype", "shape", "step", "outliers"])
def test_a_header_without_an_entry(missing):
    assert_refused({k: v for k, v in CODED.header.items() if k != missing}, BUFFERS)


@pytest.mark.parametrize("place", range(4))
def test_a_buffer_that_is_short_long_empty_missing_or_another(place):
    whole = BUFFERS[place]
    for data in (whole[:-1], whole[: len(whole) // 2], whole + b"\0", b"", BUFFERS[place - 1], whole + whole):
        assert_refused(CODED.header, replaced(place, data))
    assert_refused(CODED.header, BUFFERS[:place] + BUFFERS[place + 1 :])
    assert_refused(CODED.header, [*BUFFERS, b""])


def test_pieces_of_our_making_are_read_else():
    symbols = squeezed(bytes([121]) * -(-TENSOR.numel() // 5))
    rare = [squeezed(b"\x07\xff\x03"), squeezed(b"\x00\x05")]
    buffers = one_piece(1, [symbols, *rare, b""], rare=2, gap_bytes=3)
    back = CODEC.decoder(SETTINGS).decode(Encoded(CODED.header, buffers))
    assert (back.shape, back.dtype) == (TENSOR.shape, TENSOR.dtype)


@pytest.mark.parametrize("method", [6, 9, 0x7F, 0x86, 0xFF])
def test_a_packing_that_does_not_exist(method):
    assert_refused(CODED.header, replaced(TABLE, bytes([method]) + BUFFERS[TABLE][1:]))


def test_a_key_frame_that_holds_changes():
    assert_refused(CODED.header, replaced(TABLE, bytes([BUFFERS[TABLE][0] | 0x80]) + BUFFERS[TABLE][1:]))


def test_a_packed_byte_that_stands_for_no_symbols():
    assert_refused(CODED.header, one_piece(1, [squeezed(b"\xff" * -(-TENSOR.numel() // 5)), b"", b"", b""]))


@pytest.mark.parametrize(
    ("gaps", "low", "high"),
    [
        (b"\x01\x02", b"\x00", b""),
        (b"\x01", b"\x00\x00", b""),
        (b"\x01\xff", b"\x00\x00", b""),
        (b"\xff" * (TENSOR.numel() // 255) + b"\xfe", b"\x00", b""),
        (b"\x01", b"\xff", b"\xff"),
        (b"\x01\x02", b"\x00\x00", b"\x00"),
    ],
)
def test_rare_symbols_that_do_not_add_up(gaps, low, high):
    frames = [b"", *(squeezed(data) if data else b"" for data in (gaps, low, high))]
    assert_refused(CODED.header, one_piece(0, frames, rare=len(low), gap_bytes=len(gaps)))


def test_more_rare_symbols_than_symbols_allocate_nothing():
    bomb = squeezed(bytes(1 << 28))
    tracemalloc.start()
    try:
        assert_refused(CODED.header, one_piece(0, [b"", bomb, bomb, bomb], rare=1 << 28, gap_bytes=1 << 28))
        assert_refused(CODED.header, one_piece(5, [bomb, b"", b"", b""]))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_means_that_are_not_finite():
    assert_refused(CODED.header, replaced(CHANNELS, squeezed(bytes(96) + b"\x80\x7f" * 96)))


@pytest.mark.parametrize("gaps", [[5, 0], [0, 0], [1, TENSOR.numel()], [2**32 - 1, 1], [TENSOR.numel(), 1]], ids=str)
def test_outliers_that_repeat_or_lie_outside(gaps):
    assert_refused(CODED.header | {"outliers": 2}, replaced(OUTLIERS, outliers(gaps)))


def test_outliers_of_our_making_are_read_else():
    header = CODED.header | {"outliers": 2}
    back = CODEC.decoder(SETTINGS).decode(Encoded(header, replaced(OUTLIERS, outliers([0, 7]))))
    assert back.view(-1)[0] == back.view(-1)[7] == 0


def test_a_frame_that_hides_its_size_or_announces_another():
    symbols = TENSOR.numel()
    for frame in (squeezed(bytes(symbols), write_content_size=False), squeezed(bytes(1 << 26)), squeezed(b"")):
        assert_refused(CODED.header, one_piece(4, [frame, b"", b"", b""]))


def test_a_small_payload_that_announces_a_large_tensor_allocates_nothing():
    bomb = squeezed(bytes(1 << 28))
    header = {"dtype": "float32", "shape": [1 << 14, 1 << 14], "step": 0.1, "outliers": 1 << 28}
    tracemalloc.start()
    try:
        for buffers in ([b"", bomb, bomb, bomb], [bomb] * 4, [bytes(5 << 10), bomb, b"", bomb]):
            assert_refused(header, buffers)
        for place in (CHANNELS, OUTLIERS):
            assert_refused(CODED.header, replaced(place, bomb))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 3), flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_an_error_or_a_tensor_of_the_right_form(place, flips):
    data = bytearray(BUFFERS[place])
    for position, mask in flips:
        data[position % len(data)] ^= mask
    try:
        back = CODEC.decoder(SETTINGS).decode(Encoded(CODED.header, replaced(place, bytes(data))))
    except CodecError:
        return
    assert (back.shape, back.dtype) == (TENSOR.shape, TENSOR.dtype)
