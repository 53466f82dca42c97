"""Damage one thing at a time in what the entropy coder of NVIDIA GPUs made: does its decoder stay inside its memory?

An illegal access ends CUDA for its process, so that each kind of damage has a process of its own. The outcome of a
payload is an error before it is decoded, a status of nvCOMP, or other bytes, which the sum over the symbols shows.

    python -m benchmarks.fuzz_headers [--payloads 2000] [--seeds 5] [--kind parts --seed 3]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from mesh_codec import CodecCorrupt
from mesh_codec.ans.chunks import CHUNK, read_table
from mesh_codec.ans.coder import CoderFactory
from mesh_codec.ans.headers import PART
from mesh_codec.ans.nvcomp import NvComp

SIZES = (840, 3 * CHUNK - 5000, 20_000, 17, CHUNK)
DEVIATIONS = (3, 3, 20, 0.2, 40)

Damage = Callable[[bytearray, int, int, random.Random], None]
"""What to do to a frame, given where a chunk begins, and its size."""


def flip(first: int, stop: int) -> Damage:
    def damage(frame: bytearray, place: int, size: int, r: random.Random) -> None:
        frame[place + r.randrange(min(first, size - 8), min(stop, size))] ^= r.randint(1, 255)

    return damage


def frequencies(frame: bytearray, place: int, size: int, r: random.Random) -> None:
    """Other ones, with the same sum."""
    entries = np.frombuffer(frame, "<i2", min(256, (size - _table(frame, place)) // 2), place + _table(frame, place))
    for _ in range(r.randint(1, 6)):
        one, other = r.randrange(len(entries)), r.randrange(len(entries))
        moved = r.choice((1, 2, 5, r.randrange(2048)))
        if entries[one] >= moved and entries[other] >= 0:
            entries[one] -= moved
            entries[other] += moved
        if entries[one] == 1 and r.random() < 0.2:
            entries[one] = -1


def parts(frame: bytearray, place: int, size: int, r: random.Random) -> None:
    """Of other sizes, with the same sum."""
    sizes = np.frombuffer(frame, "<u4", (_table(frame, place) - 16) // 4, place + 16)
    one, other = r.randrange(len(sizes)), r.randrange(len(sizes))
    moved = min(r.choice((2, 16, 32)) * r.randrange(1, 500), int(sizes[one]))
    sizes[one] -= moved
    sizes[other] += moved


def body(frame: bytearray, place: int, size: int, r: random.Random) -> None:
    """Noise behind the longest header."""
    frame[place + min(600, size) : place + size] = r.randbytes(max(size - 600, 0))


def noise(frame: bytearray, place: int, size: int, r: random.Random) -> None:
    frame[place : place + size] = r.randbytes(size)


def _table(frame: bytearray, place: int) -> int:
    """Bytes of a chunk before its frequencies."""
    return 16 + 4 * -(-int.from_bytes(frame[place : place + 4], "little") // PART)


KINDS: dict[str, Damage] = {
    "a byte of 0 to 4": flip(0, 4),
    "a byte of 4 to 16": flip(4, 16),
    "a byte of 16 to 64": flip(16, 64),
    "a byte of 64 to 700": flip(64, 700),
    "a byte from 700 on": flip(700, 1 << 30),
    "frequencies": frequencies,
    "parts": parts,
    "body": body,
    "noise": noise,
}


def throw(kind: str, seed: int, payloads: int, factory: CoderFactory) -> Counter[str]:
    """Outcomes by name."""
    r, device, outcomes = random.Random(f"{kind} {seed}"), factory.device(), Counter[str]()
    coder, size = factory.open(device), SIZES[seed % len(SIZES)]
    normal = np.random.default_rng(seed).normal(0, DEVIATIONS[seed // len(SIZES) % len(DEVIATIONS)], size)
    data = torch.from_numpy(normal.round().clip(-127, 127).astype(np.int8).view(np.uint8)).to(device)
    intact = bytes(coder.compress(data).read())
    for _ in range(payloads):
        frame = bytearray(intact)
        places, sizes = read_table(memoryview(frame), size, 1 << 30)
        chunk = r.randrange(len(places))
        KINDS[kind](frame, int(places[chunk]), int(sizes[chunk]), r)
        try:
            back, checks = coder.expand(memoryview(bytes(frame)), size)
        except CodecCorrupt:
            outcomes["refused"] += 1
            continue
        failed = bool(checks[2:].any())
        outcomes["a status" if failed else "unharmed" if torch.equal(back, data) else "other symbols"] += 1
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payloads", type=int, default=2000, help="of each kind and seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kind", choices=list(KINDS), default=None, help="only this one, in this process")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.kind:
        found = throw(options.kind, options.seed, options.payloads, NvComp())
        print(", ".join(f"{name} {count}" for name, count in found.most_common()))
        return
    if not NvComp().available():
        sys.exit(f"This needs an NVIDIA GPU. {NvComp().problem()}")
    ended = 0
    for kind in KINDS:
        for seed in range(options.seeds):
            given = ["--kind", kind, "--seed", str(seed), "--payloads", str(options.payloads)]
            done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True)
            ended += done.returncode != 0
            said = done.stdout if done.returncode == 0 else f"ENDED: {(done.stderr.splitlines() or [''])[-1]}"
            print(f"{kind:20} seed {seed}: {said.strip()}", flush=True)
    sys.exit(f"{ended} processes ended" if ended else 0)


if __name__ == "__main__":
    main()
