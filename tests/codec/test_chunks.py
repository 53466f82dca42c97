"""How coded chunks lie in a buffer, and the coder of NVIDIA GPUs around a library that codes on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mesh_codec import CodecCorrupt, CodecUnsupported
from mesh_codec.ans.chunks import CHUNK, frame_size, padded, plain_chunks, read_table, table_size
from mesh_codec.ans.dispatch import checksum

from .emulated_ans import EmulatedAns

CPU = torch.device("cpu")
ROOM = CHUNK + 100
SIZES = (1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 77)


def symbols(size: int) -> torch.Tensor:
    random = np.random.default_rng(size)
    return torch.from_numpy(np.minimum(random.geometric(0.3, size), 255).astype(np.uint8))


def right(data: torch.Tensor, checks: torch.Tensor) -> bool:
    return bool((checks[2:] == 0).all()) and torch.equal(checks[:2].view(torch.int64), checksum(data))


@pytest.mark.parametrize("size", SIZES)
def test_what_was_coded_comes_back(size):
    coder, data = EmulatedAns().open(CPU), symbols(size)
    # Twice: the second time everything lies where it lay.
    for _ in range(2):
        frame = coder.compress(data).read()
        back, checks = coder.expand(memoryview(bytes(frame)), size)
        assert torch.equal(back, data) and right(data, checks)
        assert len(checks) == 2 + -(-size // CHUNK)


def test_a_frame_is_its_table_and_its_chunks_filled_up_with_zeros():
    coder, data = EmulatedAns().open(CPU), symbols(3 * CHUNK // 2)
    frame = bytes(coder.compress(data).read())
    sizes = np.frombuffer(frame, "<u4", 2).astype(np.int64)
    assert len(frame) == frame_size(sizes) == 16 + sum(map(padded, sizes))
    assert not any(frame[8:16]) and not any(frame[16 + sizes[0] : 16 + padded(sizes[0])])
    assert not any(frame[len(frame) - padded(sizes[1]) + sizes[1] :])
    places, found = read_table(memoryview(frame), len(data), ROOM)
    assert places.tolist() == [16, 16 + padded(sizes[0])] and found.tolist() == sizes.tolist()


@pytest.mark.parametrize("entry", [0, ROOM + 1, 1 << 31, (1 << 32) - 1])
def test_a_table_that_lies_is_seen_before_anything_is_decoded(entry):
    data = symbols(3 * CHUNK)
    frame = bytearray(EmulatedAns().open(CPU).compress(data).read())
    frame[4:8] = entry.to_bytes(4, "little")
    with pytest.raises(CodecCorrupt):
        read_table(memoryview(frame), len(data), ROOM)


def test_a_frame_of_another_length_or_for_other_symbols_is_seen():
    data = symbols(3 * CHUNK)
    frame = bytes(EmulatedAns().open(CPU).compress(data).read())
    for view, size in ((b"", 1), (frame[:8], len(data)), (frame[:-1], len(data)), (frame + b"\0", len(data)),
                       (frame, len(data) + 1), (frame, CHUNK), (frame, 1 << 31)):  # fmt: skip
        with pytest.raises(CodecCorrupt):
            read_table(memoryview(view), size, ROOM)


def test_damage_inside_a_chunk_shows_in_its_status_and_nobody_elses():
    coder, data = EmulatedAns().open(CPU), symbols(3 * CHUNK)
    frame = bytearray(coder.compress(data).read())
    places, _ = read_table(memoryview(frame), len(data), ROOM)
    frame[places[1] + 2] ^= 0xFF
    back, checks = coder.expand(memoryview(frame), len(data))
    assert (checks[2:] != 0).tolist() == [False, True, False]
    assert torch.equal(back[:CHUNK], data[:CHUNK]) and torch.equal(back[2 * CHUNK :], data[2 * CHUNK :])


def test_exchanged_chunks_show_in_the_sum():
    coder = EmulatedAns().open(CPU)
    data = torch.cat([symbols(CHUNK), symbols(CHUNK).flip(0)])
    frame = bytearray(coder.compress(data).read())
    (first, second), sizes = read_table(memoryview(frame), len(data), ROOM)
    swapped = frame[4:8] + frame[:4] + frame[8:first] + frame[second:] + frame[first:second]
    assert table_size(2) == 16 and sizes.min() > 0
    back, checks = coder.expand(memoryview(swapped), len(data))
    assert not (checks[2:]).any() and not torch.equal(checks[:2].view(torch.int64), checksum(data))
    assert torch.equal(back, torch.cat([data[CHUNK:], data[:CHUNK]]))


@pytest.mark.parametrize("failing", ["call", "chunk"])
def test_a_chunk_that_cannot_be_coded_is_an_error(failing):
    factory = EmulatedAns()
    factory.failing = failing
    with pytest.raises(CodecUnsupported):
        factory.open(CPU).compress(symbols(2 * CHUNK)).read()


@pytest.mark.parametrize("size", SIZES)
def test_chunks_cover_all_symbols(size):
    places, sizes = plain_chunks(size)
    assert sizes.sum() == size and (places == np.cumsum(sizes) - sizes).all() and sizes.max() <= CHUNK
