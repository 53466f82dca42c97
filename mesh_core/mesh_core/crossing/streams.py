"""State to message and back: the codec streams of one direction of one session.

Both ends build the same streams from what they agreed on when the session opened; a message that was coded in any
other way is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from mesh_codec.base import Buffer, Codec, CodecChoice, DecodeLimits, Decoder, Encoded, Encoder
from mesh_core.crossing.sequences import MOST_SEQUENCES, pass_of
from mesh_core.errors import WireMalformed
from mesh_core.model.spec import State

_ALIGNMENT = 64
"""Bytes. Matrix libraries give other last bits on memory that is aligned differently; torch allocates at 64."""


@dataclass(frozen=True)
class Payload:
    """A coded state: entries for the header, buffers for the wire, and what it cost (bytes, milliseconds)."""

    entries: list[dict[str, Any]]
    buffers: list[Buffer]
    raw_bytes: int
    coded_bytes: int
    ms: float


@dataclass
class _Passes:
    """The streams of one sequence, by tensor."""

    sequence: str
    encoders: dict[str, Encoder] = field(default_factory=dict)
    decoders: dict[str, Decoder] = field(default_factory=dict)


class Streams:
    """Encoders or decoders per (sequence, tensor). Used from one thread at a time.

    Holds few sequences; both ends drop the same ones, and an end that dropped another asks for a key frame.

    Args:
        choices: codec and settings per tensor name, as agreed.
        codecs: what this end has.

    Raises:
        WireMalformed: a choice names a codec that this end does not have.
    """

    def __init__(self, choices: Mapping[str, CodecChoice], codecs: Mapping[str, Codec], limits: DecodeLimits) -> None:
        missing = {c.codec for c in choices.values()} - codecs.keys()
        if missing:
            raise WireMalformed(f"Codec {min(missing)!r} was agreed on but is not installed here.", hint="mesh plugins")
        self._choices, self._codecs, self._limits = choices, codecs, limits
        self._passes: OrderedDict[str, _Passes] = OrderedDict()

    @property
    def names(self) -> Set[str]:
        """Of the tensors that were agreed on."""
        return self._choices.keys()

    def reset(self) -> None:
        """Start all streams at a key frame again, as the other end does."""
        self._passes.clear()

    def _of(self, sequence: str) -> _Passes:
        """The streams of ``sequence``; those of an earlier generation of the same pass are dropped."""
        name = pass_of(sequence)
        held = self._passes.get(name)
        if held is None or held.sequence != sequence:
            held = self._passes[name] = _Passes(sequence)
        self._passes.move_to_end(name)
        while len(self._passes) > MOST_SEQUENCES:
            self._passes.popitem(last=False)
        return held

    def encode(self, sequence: str, state: State) -> Payload:
        """``state`` as the next message of ``sequence``: the tensors that were agreed on, of any shape."""
        started = perf_counter()
        encoders = self._of(sequence).encoders
        entries: list[dict[str, Any]] = []
        buffers: list[Buffer] = []
        raw = 0
        for name, tensor in state.items():
            choice = self._choices[name]
            if name not in encoders:
                encoders[name] = self._codecs[choice.codec].encoder(choice.settings)
            coded = encoders[name].encode(tensor)
            entries.append(entry(name, choice, coded))
            buffers.extend(coded.buffers)
            raw += tensor.numel() * tensor.element_size()
        size = sum(memoryview(b).nbytes for b in buffers)
        return Payload(entries, buffers, raw, size, (perf_counter() - started) * 1e3)

    def decode(
        self, sequence: str, entries: Sequence[Mapping[str, Any]], buffers: Sequence[Buffer], device: torch.device
    ) -> State:
        """The state on ``device``.

        Raises:
            WireMalformed: another tensor, codec or setting than agreed, or buffers that do not add up.
            CodecError: a payload that its codec refuses.
        """
        decoders = self._of(sequence).decoders
        state: State = {}
        position = 0
        for item in entries:
            name, count = item["n"], item["k"]
            choice = self._choices.get(name)
            if choice is None or name in state:
                raise WireMalformed(f"Tensor {name!r} was not agreed on, or came twice.")
            if (item["c"], item["s"]) != (choice.codec, dict(choice.settings)):
                raise WireMalformed(
                    f"Tensor {name!r} came coded as {item['c']} {item['s']}, agreed was {choice.codec} "
                    f"{dict(choice.settings)}."
                )
            if name not in decoders:
                decoders[name] = self._codecs[choice.codec].decoder(choice.settings, self._limits)
            part = Encoded(item["h"], buffers[position : position + count])
            state[name] = aligned(decoders[name].decode(part, device))
            position += count
        if position != len(buffers):
            raise WireMalformed(f"{len(buffers)} buffers came, the tensors account for {position}.")
        return state


def entry(name: str, choice: CodecChoice, coded: Encoded) -> dict[str, Any]:
    """The header entry of one coded tensor."""
    return {
        "n": name,
        "c": choice.codec,
        "s": dict(choice.settings),
        "h": coded.header,
        "k": len(coded.buffers),
    }


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, copied if its memory is a network buffer at an odd place."""
    odd = tensor.device.type == "cpu" and tensor.numel() > 0 and tensor.data_ptr() % _ALIGNMENT
    return tensor.clone() if odd else tensor
