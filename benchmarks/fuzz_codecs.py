"""Throw damaged payloads at the decoders: each must give a tensor of the announced form, or a CodecError.

Damage: header values, flipped, cut, added and foreign bytes, frames lost, swapped and replayed, and for the entropy
and lossless codecs zstandard frames that are well formed with contents that are not. Where there is an NVIDIA GPU,
those two are the ones that run there. Every round ends with an intact key frame, which must decode. Memory is watched.
The first failure is printed with its seed, and the exit code is 1.

    python -m benchmarks.fuzz_codecs [--minutes 10] [--codecs raw,lossless,entropy] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
from collections import Counter
from time import monotonic
from typing import Any

import numpy as np
import psutil
import torch

from mesh_codec import (
    Codec,
    CodecError,
    DecodeLimits,
    Decoder,
    Encoded,
    EntropyCodec,
    HevcCodec,
    LosslessCodec,
    RawCodec,
)
from mesh_codec.pieces import Packed, table
from mesh_codec.symbols import PACKINGS, squeeze

LIMITS = DecodeLimits(max_elements=1 << 22, max_bytes=1 << 24)
MOST_MEMORY = 1 << 30
"""Bytes that the process may grow by."""

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 1 << 31, 1 << 63, 10**30, 0.0, -1.5, 1e38, float("nan"), float("inf"), "", "float32"),
    *("bfloat16", "int64", b"", b"12345678", [], [0], [1 << 40, 2], [1, 1, 1, 1, 1, 1, 1, 1, 1], [-1], ["2"], {}),
)
SHAPES = ((70, 12), (1, 130, 24), (5,), (), (0, 4), (3, 3, 3), (1500, 256))
"""The last one is several chunks for a coder on a GPU."""


class Fuzzer:
    def __init__(self, codec: Codec, seed: int) -> None:
        self.codec, self.random = codec, random.Random(seed)
        self.settings = codec.settings("balanced", codec.capabilities())
        self.sequences = [self._sequence(shape, i) for i, shape in enumerate(SHAPES)]
        self.seen: Counter[str] = Counter()

    def _sequence(self, shape: tuple[int, ...], seed: int) -> list[Encoded]:
        generator = torch.Generator().manual_seed(seed)
        encoder = self.codec.encoder(self.settings)
        first = torch.randn(shape, generator=generator)
        made = []
        for _ in range(4):
            first = first + 0.05 * torch.randn(shape, generator=generator)
            coded = encoder.encode(first.to((torch.bfloat16, torch.float16, torch.float32)[seed % 3]))
            made.append(Encoded(dict(coded.header), [bytes(b) for b in coded.buffers]))
        return made

    def round(self) -> None:
        decoder = self.codec.decoder(self.settings, LIMITS)
        frames = self.random.choice(self.sequences)
        for i in range(self.random.randint(0, 3)):
            decoder.decode(frames[i])
        for _ in range(self.random.randint(1, 4)):
            self._decode(decoder, self._damaged(self.random.choice(frames)))
        decoder.reset()
        decoder.decode(frames[0])

    def _decode(self, decoder: Decoder, coded: Encoded) -> None:
        try:
            tensor = decoder.decode(coded)
        except CodecError as error:
            self.seen[type(error).__name__] += 1
            return
        assert list(tensor.shape) == list(coded.header["shape"]), "another shape than announced"
        assert str(tensor.dtype) == f"torch.{coded.header['dtype']}", "another type than announced"
        self.seen["tensor"] += 1

    def _damaged(self, coded: Encoded) -> Encoded:
        header, buffers = dict(coded.header), [bytes(b) for b in coded.buffers]
        for _ in range(self.random.randint(0, 2)):
            kind = self.random.randrange(4)
            if kind == 0:
                header[self.random.choice(list(header))] = self.random.choice(ODD_VALUES)
            elif kind == 1 and isinstance(header["shape"], list) and header["shape"]:
                place = self.random.randrange(len(header["shape"]))
                header["shape"] = [*header["shape"]]
                header["shape"][place] = self.random.choice((0, 1, 2, 64, 70, 1 << 12, 1 << 20))
            elif buffers:
                place = self.random.randrange(len(buffers))
                buffers[place] = self._bytes(buffers[place])
        if self.random.random() < 0.1 and buffers:
            self.random.shuffle(buffers)
        if self.random.random() < 0.3 and len(buffers) == 4:
            buffers[0], buffers[2] = self._forged(header)
        elif self.random.random() < 0.3 and len(buffers) == 4:
            buffers[2] = self._shifted(buffers[2])
        return Encoded(header, buffers)

    def _bytes(self, data: bytes) -> bytes:
        kind, r = self.random.randrange(7), self.random
        if kind == 0:
            return data[: r.randint(0, len(data))]
        if kind == 1:
            return data + r.randbytes(r.randint(1, 9))
        if kind == 2:
            return r.choice([bytes(b) for frame in r.choice(self.sequences) for b in frame.buffers] or [b""])
        if kind == 3:
            return squeeze(np.frombuffer(r.randbytes(r.choice((1, 36, 72, 840, 3120))), dtype=np.uint8))
        changed = bytearray(data)
        # Headers are at the beginning.
        reach = min(len(changed), 600) if kind == 4 else len(changed)
        for _ in range(r.randint(1, 4)):
            if changed:
                changed[r.randrange(reach)] ^= r.randint(1, 255)
        return bytes(changed)

    def _shifted(self, frame: bytes) -> bytes:
        """A table of chunks (`mesh_codec.ans.chunks`) whose entries fit the frame, but not the chunks."""
        r, changed = self.random, bytearray(frame)
        numbers = np.frombuffer(changed, "<u4", min(3, len(changed) // 4))
        if len(numbers):
            one, other = r.randrange(len(numbers)), r.randrange(len(numbers))
            moved = r.choice((1, 2, 15, 16, 16 * r.randrange(1 << 12)))
            numbers[one] = (int(numbers[one]) + moved) % (1 << 32)
            numbers[other] = (int(numbers[other]) - moved) % (1 << 32)
        return bytes(changed)

    def _forged(self, header: dict[str, Any]) -> tuple[bytes, bytes]:
        """A table and frames of one piece that are well formed, with noise in them."""
        shape = header["shape"] if isinstance(header["shape"], list) else []
        count = int(np.prod([n for n in shape if type(n) is int and 0 <= n <= 4096] or [1]))
        r = self.random
        packing = r.randrange(len(PACKINGS))
        rare = r.choice((0, 1, 5, min(count, 4096)))
        gap_bytes = rare + r.choice((0, 0, 1, count // 255))
        sizes = (min(PACKINGS[packing].size(min(count, 1 << 18)), 1 << 19), gap_bytes, rare, rare)
        high = r.choice((1, 3, 80, 255))
        frames = [
            squeeze((np.frombuffer(r.randbytes(n), np.uint8) % high).astype(np.uint8)) if n else b"" for n in sizes
        ]
        a, b, c, d = frames
        piece = Packed(r.random() < 0.5, packing, (a, b, c, d if r.random() < 0.5 else b""), rare, gap_bytes)
        return table([piece]), b"".join(piece.frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--codecs", default="raw,lossless,entropy")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Codec] = {c.name: c for c in (RawCodec(), LosslessCodec(), EntropyCodec(), HevcCodec())}
    fuzzers = [Fuzzer(known[name], options.seed) for name in options.codecs.split(",")]
    for fuzzer in fuzzers:
        print(f"{fuzzer.codec.name:10} {fuzzer.settings}", flush=True)
    process = psutil.Process()
    before, end, rounds = process.memory_info().rss, monotonic() + 60 * options.minutes, 0
    while monotonic() < end:
        for fuzzer in fuzzers:
            fuzzer.random.seed(f"{options.seed} {rounds}")
            try:
                fuzzer.round()
            except Exception:
                traceback.print_exc()
                sys.exit(f"{fuzzer.codec.name}, --seed {options.seed}, round {rounds}")
        rounds += 1
        if rounds % 256 == 0 and process.memory_info().rss - before > MOST_MEMORY:
            sys.exit(f"memory has grown by {(process.memory_info().rss - before) / 1e6:.0f} MB by round {rounds}")
    grown = (process.memory_info().rss - before) / 1e6
    print(f"{rounds} rounds in {options.minutes:g} minutes, memory has grown by {grown:.0f} MB")
    for fuzzer in fuzzers:
        print(f"{fuzzer.codec.name:10}", ", ".join(f"{name} {count}" for name, count in fuzzer.seen.most_common()))


if __name__ == "__main__":
    main()
