"""Messages as an authorised but hostile program might send them: real ones, mutated; and noise."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import msgpack

_VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 7, 255, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, float("nan"), float("inf"), "", "raw",
    "float32", "bfloat16", "int64", "x" * 70_000, b"", b"\0" * 16, b"\xff" * 15, [], [[]], [0, 99], [2**40, 2**40],
    [1, 23, 64], {}, {"codec": "raw", "settings": {}}, {"": {"": {"": {}}}}, [[[[[[[[[[0]]]]]]]]]], list(range(5000)),
)  # fmt: skip
"""What takes the place of a field."""

_TYPES = [
    "hello",
    "welcome",
    "enrol",
    "enrolled",
    "catalogue",
    "catalogued",
    "open",
    "progress",
    "opened",
    "admit",
    "ok",
    "constants",
    "step",
    "result",
    "failed",
    "cancel",
    "close",
    "ping",
    "pong",
    "probe",
    "probed",
    "nonesuch",
]


class Mutator:
    """Endless hostile messages, the same ones for the same seed.

    Args:
        recorded: real messages as frames; the first frame is msgpack.
    """

    def __init__(self, recorded: list[list[bytes]], seed: int) -> None:
        self._recorded, self._random = recorded, random.Random(seed)

    def message(self) -> list[bytes]:
        """The frames of the next one."""
        pick = self._random.choice
        make = pick((self._noise, self._flipped, self._other_fields, self._other_fields, self._other_buffers))
        return make([bytes(frame) for frame in pick(self._recorded)])

    def _noise(self, frames: list[bytes]) -> list[bytes]:
        return [self._random.randbytes(self._random.choice((0, 1, 9, 300))) for _ in range(self._random.randint(1, 4))]

    def _flipped(self, frames: list[bytes]) -> list[bytes]:
        frame = bytearray(frames[0])
        for _ in range(self._random.randint(1, 4)):
            frame[self._random.randrange(len(frame))] = self._random.randrange(256)
        return [bytes(frame), *frames[1:]]

    def _other_fields(self, frames: list[bytes]) -> list[bytes]:
        header = msgpack.unpackb(frames[0])
        for _ in range(self._random.randint(1, 2)):
            self._change(header)
        if self._random.random() < 0.1:
            header["t"] = self._random.choice(_TYPES)
        return [msgpack.packb(header), *frames[1:]]

    def _change(self, node: Any) -> None:
        """Replace, drop or add something somewhere in ``node``."""
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        place = self._random.choice(places) if places else None
        inner = node[place] if place is not None else None
        if isinstance(inner, (dict, list)) and inner and self._random.random() < 0.7:
            self._change(inner)
        elif place is None or self._random.random() < 0.1:
            self._add(node)
        elif self._random.random() < 0.2:
            del node[place]
        else:
            node[place] = deepcopy(self._random.choice(_VALUES))

    def _add(self, node: Any) -> None:
        value = deepcopy(self._random.choice(_VALUES))
        if isinstance(node, dict):
            node[self._random.choice(("x", "n", "dtype", "__class__"))] = value
        else:
            node.append(value)

    def _other_buffers(self, frames: list[bytes]) -> list[bytes]:
        """Buffers that lack, are too many, too short or hold anything, with a header that says so or does not."""
        buffers = list(frames[1:])
        what = self._random.randrange(4)
        if what == 0 and buffers:
            buffers.pop()
        elif what == 1:
            buffers += [self._random.randbytes(64)] * self._random.choice((1, 2, 300))
        elif what == 2 and buffers:
            buffers[-1] = buffers[-1][: self._random.randrange(len(buffers[-1]) + 1)]
        elif buffers:
            buffers[0] = self._random.randbytes(len(buffers[0]))
        header = msgpack.unpackb(frames[0])
        if self._random.random() < 0.7:
            header["b"] = [len(b) for b in buffers]
        return [msgpack.packb(header), *buffers]
