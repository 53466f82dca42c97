"""Messages as an authorised but hostile program might send them: real ones, mutated; and noise."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import msgpack
from blake3 import blake3

from mesh_core import wire
from mesh_core.loras.part import Part
from mesh_core.loras.read import lora_of_state
from mesh_core.model.fingerprint import structure
from mesh_core.model.library import Checkpoint
from mesh_core.wire.messages import MESSAGES
from tests.support import loras

_VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 7, 255, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, float("nan"), float("inf"), "", "raw",
    "float32", "bfloat16", "int64", "x" * 70_000, b"", b"\0" * 16, b"\xff" * 15, [], [[]], [0, 99], [2**40, 2**40],
    [1, 23, 64], {}, {"codec": "raw", "settings": {}}, {"": {"": {"": {}}}}, [[[[[[[[[[0]]]]]]]]]], list(range(5000)),
)  # fmt: skip
"""What takes the place of a field."""

_TYPES = [*MESSAGES, "nonesuch"]


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
            self.change(header)
        if self._random.random() < 0.1:
            header["t"] = self._random.choice(_TYPES)
        return [msgpack.packb(header), *frames[1:]]

    def change(self, node: Any) -> None:
        """Replace, drop or add something somewhere in ``node``."""
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        place = self._random.choice(places) if places else None
        inner = node[place] if place is not None else None
        if isinstance(inner, (dict, list)) and inner and self._random.random() < 0.7:
            self.change(inner)
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


class HostileLoras:
    """Endless LoRAs whose bytes have the hash that they are offered with, so that a worker looks at what is in them:
    some are right, in others the head was changed.

    Args:
        model: that they are for.
    """

    def __init__(self, model: Checkpoint, mutator: Mutator, seed: int) -> None:
        self._model, self._mutator, self._random = model, mutator, random.Random(seed)
        self._shapes = {
            name.removesuffix(".weight"): tuple(facts.shape)
            for name, facts in model.spec.parameters.items()
            if ".to_q." in name or ".linear_in." in name
        }

    def messages(self) -> Iterator[list[bytes]]:
        """The frames of those that send the next one."""
        rank, seed = self._random.randint(1, 4), self._random.randrange(1000)
        chosen = self._random.sample(sorted(self._shapes), self._random.randint(1, len(self._shapes)))
        state = loras.peft({name: self._shapes[name] for name in chosen}, rank=rank, seed=seed)
        lora = lora_of_state(state, self._model, f"lora {seed}", {})
        part = Part(lora)
        data = part.read(0, part.nbytes)
        if self._random.random() < 0.8:
            data = self._with_another_head(data)
        digest = blake3(data).hexdigest()
        spec = self._model.spec
        offer = wire.Offer(wire.next_id(), lora.id, digest, len(data), spec.family, structure(spec), f"lora {seed}")
        yield [bytes(frame) for frame in wire.pack(offer)]
        step = self._random.choice((len(data), 1000, 100_000))
        for start in range(0, len(data), step):
            chunk = wire.Chunk(wire.next_id(), lora.id, start)
            yield [bytes(frame) for frame in wire.pack(chunk, [data[start : start + step]])]

    def _with_another_head(self, data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        head, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
        inner = self._random.choice(("", "patches", "hashes"))
        node = json.loads(head["__metadata__"][inner]) if inner else head
        for _ in range(self._random.randint(1, 3)):
            self._mutator.change(node)
        if inner:
            head["__metadata__"][inner] = json.dumps(node, default=str)
        written = json.dumps(head, default=str).encode()
        return struct.pack("<Q", len(written)) + written + tensors
