"""State to message and back: the codec streams of one direction of one session.

Both ends build the same streams from what they agreed on when the session opened; a message that was coded in any
other way is refused. A stream keeps what it was before the last step: where that step did not end, or its result did
not arrive, both ends go back, and the next step is coded as if it had never been.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from mesh_codec.base import Buffer, Codec, CodecChoice, DecodeLimits, Decoder, Encoded, Encoder
from mesh_codec.errors import CodecStateLost
from mesh_core.crossing.sequences import MOST_SEQUENCES, Turn, pass_of
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
    """The streams of one sequence, by tensor.

    Attributes:
        step: that was coded last; 0 if none was, or if it failed midway.
        before: the step that it was predicted from, and the state of every stream then.
    """

    sequence: str
    encoders: dict[str, Encoder] = field(default_factory=dict)
    decoders: dict[str, Decoder] = field(default_factory=dict)
    step: int = 0
    before: tuple[int, dict[str, object]] = (0, {})

    def begin(self, after: int, *, remembering: bool) -> None:
        """Have all streams stand where the step numbered ``after`` left them; 0: at a key frame.

        Args:
            remembering: whether any of them has a memory.

        Raises:
            CodecStateLost: nothing is known of that step any more.
        """
        ends: dict[str, Encoder | Decoder] = {**self.encoders, **self.decoders}
        known = after in (self.step, self.before[0])
        if after and remembering and not known:
            raise CodecStateLost(f"What step {after} left in the codecs is not here.", hint="a key frame")
        if not after or not known:
            for end in ends.values():
                end.reset()
            self.before = 0, {}
        elif after == self.step:
            self.before = after, {name: end.state() for name, end in ends.items()}
        else:
            for name, end in ends.items():
                if name in self.before[1]:
                    end.restore(self.before[1][name])
                else:
                    end.reset()
        self.step = 0


class Streams:
    """Encoders or decoders per (sequence, tensor). Used from one thread at a time.

    Holds few sequences, and of each what two steps left: both ends drop the same ones, and an end that dropped another
    asks for a key frame.

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
        self._remembering = any(codecs[c.codec].memory(c.settings) != "none" for c in choices.values())
        self._passes: OrderedDict[str, _Passes] = OrderedDict()

    @property
    def near(self) -> bool:
        """Whether a tensor crosses in a way that is only for processes of one user on one machine."""
        return any(self._codecs[choice.codec].near for choice in self._choices.values())

    @property
    def names(self) -> Set[str]:
        """Of the tensors that were agreed on."""
        return self._choices.keys()

    @property
    def choices(self) -> Mapping[str, CodecChoice]:
        """Codec and settings by tensor, as agreed."""
        return self._choices

    def alike(self, other: Streams) -> bool:
        """Whether ``other`` codes the same tensors in the same way, so that it can go on for this."""
        mine, theirs = (
            {name: (c.codec, dict(c.settings)) for name, c in streams.choices.items()} for streams in (self, other)
        )
        return mine == theirs

    def _of(self, turn: Turn) -> _Passes:
        """The streams of a sequence, at ``turn``; those of an earlier generation of the same pass are dropped."""
        name = pass_of(turn.sequence)
        held = self._passes.get(name)
        if held is None or held.sequence != turn.sequence:
            held = self._passes[name] = _Passes(turn.sequence)
        self._passes.move_to_end(name)
        while len(self._passes) > MOST_SEQUENCES:
            self._passes.popitem(last=False)
        held.begin(turn.after, remembering=self._remembering)
        return held

    def encode(self, turn: Turn, state: State) -> Payload:
        """``state`` as the message of ``turn``: the tensors that were agreed on, of any shape.

        Raises:
            CodecStateLost: this end does not have what the turn builds on.
        """
        started = perf_counter()
        held = self._of(turn)
        encoders = held.encoders
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
        held.step = turn.step
        size = sum(memoryview(b).nbytes for b in buffers)
        return Payload(entries, buffers, raw, size, (perf_counter() - started) * 1e3)

    def decode(
        self, turn: Turn, entries: Sequence[Mapping[str, Any]], buffers: Sequence[Buffer], device: torch.device
    ) -> State:
        """The state on ``device``.

        Raises:
            WireMalformed: another tensor, codec or setting than agreed, or buffers that do not add up.
            CodecError: a payload that its codec refuses, `CodecStateLost` among them.
        """
        held = self._of(turn)
        decoders = held.decoders
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
        held.step = turn.step
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
