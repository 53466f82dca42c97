"""What packing and unpacking a message costs, next to plain msgpack of the same map without any check.

    python benchmarks/wire.py [--rounds 2000]

The messages are a step of a chain of three workers with two tensors, its result, and a ping. Buffers are empty: they
are not touched. Medians in microseconds; the two ways alternate, so that both see the same machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter_ns
from typing import Any

import msgpack

from mesh_core import wire

SESSION = bytes(range(16))
HASHES = {name: f"{number:064x}" for number, name in enumerate(("txt_ids", "img_ids", "text", "guidance"))}


def tensor(name: str, buffers: int) -> dict[str, Any]:
    """The entry of a hidden state as a codec makes it."""
    settings = {"quality": "balanced", "step": 0.0625, "temporal": True}
    header = {"dtype": "bfloat16", "shape": [1, 4096, 4096], "frame": "delta", "scale": 0.03125, "planes": [7, 8, 1]}
    return {"n": name, "c": "entropy", "s": settings, "h": header, "k": buffers}


def report(worker: str, span: str) -> dict[str, Any]:
    """What one worker measured of a step."""
    sizes = {"in_raw": 33_554_432, "in_coded": 11_234_567, "out_raw": 33_554_432, "out_coded": 11_345_678}
    times = {"queue_ms": 0.125, "decode_ms": 3.5, "compute_ms": 212.75, "encode_ms": 4.25, "busy_ms": 221.5}
    return {"worker": worker, "span": span, **sizes, **times}


def messages() -> list[tuple[wire.Message, int]]:
    """Each with the number of its buffers."""
    tensors = [tensor("hidden", 4), tensor("temb", 1)]
    trace = [report("blue", "4:12"), report("red", "12:20")]
    options = {"guidance": 3.5, "frames": 25, "mask": None}
    return [
        (wire.Step(7, SESSION, 3, 1, 2, "cond#41", HASHES, options, tensors, trace, 300_000), 5),
        (wire.Result(7, SESSION, 3, 1, tensors, [*trace, report("green", "20:32")]), 5),
        (wire.Ping(11, SESSION), 0),
    ]


def timed(call: Callable[[], Any]) -> int:
    """Nanoseconds of one call."""
    started = perf_counter_ns()
    call()
    return perf_counter_ns() - started


def measure(message: wire.Message, count: int, rounds: int) -> list[float]:
    """Microseconds: pack, unpack, msgpack's packb, msgpack's unpackb."""
    buffers = [b""] * count
    frames = wire.pack(message, buffers)
    header = msgpack.unpackb(frames[0])
    ways: list[Callable[[], Any]] = [
        lambda: wire.pack(message, buffers),
        lambda: wire.unpack(frames),
        lambda: msgpack.packb(header),
        lambda: msgpack.unpackb(frames[0]),
    ]
    times = [[timed(way) for way in ways] for _ in range(rounds)]
    return [median(column) / 1e3 for column in zip(*times, strict=True)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    rounds = parser.parse_args().rounds
    print("| message | header bytes | pack us | unpack us | both us | msgpack pack us | msgpack unpack us |")
    print("|---|---|---|---|---|---|---|")
    for message, count in messages():
        size = len(wire.pack(message, [b""] * count)[0])
        pack, unpack, plain_pack, plain_unpack = measure(message, count, rounds)
        row = (pack, unpack, pack + unpack, plain_pack, plain_unpack)
        print(f"| {type(message).__name__} | {size} | {' | '.join(f'{us:.1f}' for us in row)} |")


if __name__ == "__main__":
    main()
