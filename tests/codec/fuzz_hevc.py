"""A fuzzer over the hevc decoder: damaged video with checksums that match, as only a hostile sender makes it.

    python -m tests.codec.fuzz_hevc --minutes 10

Every payload must end in a named error or a tensor of the right form, in bounded time and memory; then a whole payload
must decode as ever. A crash of the process is a finding too. Prints what was seen.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from time import perf_counter

import numpy as np
import psutil
import torch

from mesh_codec import CodecError, Encoded
from mesh_codec.hevc import HevcCodec
from mesh_codec.payload import crc_of

from .structured import activations

_LONGEST = 2.0
"""Seconds for one payload of this size on a busy machine."""

_MOST_GROWTH = 300 << 20
"""Bytes by which the process may grow."""


def mutated(data: bytes, others: list[bytes], random: np.random.Generator) -> bytes:
    changed = bytearray(data)
    kind = random.integers(6)
    if kind == 0:
        for _ in range(random.integers(1, 20)):
            changed[random.integers(len(changed))] ^= 1 << int(random.integers(8))
    elif kind == 1:
        start = int(random.integers(len(changed)))
        changed[start : start + int(random.integers(1, 64))] = random.bytes(int(random.integers(64)))
    elif kind == 2:
        changed = changed[: random.integers(len(changed))]
    elif kind == 3:
        other = others[random.integers(len(others))]
        changed = changed[: random.integers(len(changed))] + bytearray(other[random.integers(len(other)) :])
    elif kind == 4:  # in the parameter sets and slice headers, where a decoder believes what it reads
        for _ in range(random.integers(1, 4)):
            changed[random.integers(min(len(changed), 120))] = int(random.integers(256))
    else:
        place = int(random.integers(len(changed)))
        changed[place:place] = changed[place : place + int(random.integers(1, 200))]
    return bytes(changed)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random, seen, process = np.random.default_rng(options.seed), Counter[str](), psutil.Process()
    codec = HevcCodec()
    cases = []
    for settings in ({"qp": 20}, {"qp": 12, "bits": 10}, {"lossless": True}, {"qp": 24, "tile": 2}):
        encoder = codec.encoder(settings)
        tensor = activations(81, 700 if "tile" in settings else 90, dtype=torch.float32)
        stream = [encoder.encode(tensor + 0.1 * number) for number in range(3)]
        cases.append((settings, stream, codec.decoder(settings).decode(stream[0])))
    packets = [bytes(coded.buffers[2]) for _, stream, _ in cases for coded in stream]
    until, grown_from, slowest, count = perf_counter() + 60 * options.minutes, process.memory_info().rss, 0.0, 0
    while perf_counter() < until:
        settings, stream, expected = cases[random.integers(len(cases))]
        decoder, place = codec.decoder(settings), int(random.integers(len(stream)))
        for coded in stream[:place]:
            decoder.decode(coded)
        parts = [bytes(b) for b in stream[place].buffers]
        parts[2] = mutated(parts[2], packets, random)
        frames = len(parts[0]) // 4
        sizes = np.frombuffer(parts[0], "<u4").copy()
        sizes[-1] = max(0, len(parts[2]) - int(sizes[:-1].sum())) if frames else 0
        parts[0] = sizes.tobytes()
        began = perf_counter()
        try:
            back = decoder.decode(Encoded(stream[place].header | {"crc": crc_of(tuple(parts))}, parts))
            seen["decoded"] += 1
            assert (back.shape, back.dtype) == (expected.shape, expected.dtype)
        except CodecError as error:
            seen[type(error).__name__] += 1
        slowest, count = max(slowest, perf_counter() - began), count + 1
        assert torch.equal(decoder.decode(stream[0]), expected), "the next tensor was harmed"
        assert slowest < _LONGEST, f"a payload took {slowest:.1f} s"
        growth = process.memory_info().rss - grown_from
        assert growth < _MOST_GROWTH, f"the process grew by {growth >> 20} MiB"
    print(f"{count} payloads, {dict(seen)}; slowest {slowest * 1e3:.0f} ms; grown by {growth >> 20} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
