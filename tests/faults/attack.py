"""A member that sends hostile messages and LoRAs without end, with an honest host beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mesh_core import wire
from mesh_core.model.library import Checkpoint
from mesh_core.plugins.registry import Plugins
from mesh_core.transport.base import Channel
from tests.faults.conftest import Case
from tests.faults.honest import Honest, honest_host, kinds
from tests.faults.mutations import HostileLoras, Mutator
from tests.faults.processes import FastWorker

_LOOK_EVERY = 250
"""Messages between two looks at the worker."""

_LORA_EVERY = 25
"""Messages between two LoRAs."""


@dataclass
class Report:
    """What came of it.

    Attributes:
        sent: messages.
        answered: messages that the worker sent back.
        grown: bytes of memory that the worker has more than before, at most.
    """

    sent: int
    answered: int
    loras: int
    grown: int
    honest: Honest


def drain(channel: Channel) -> int:
    """Take what came without looking at it; how much it was."""
    count = 0
    while channel.receive(0) is not None:
        count += 1
    return count


def all_is_read(channel: Channel) -> int:
    """Return once the worker has read all that was sent, and still answers; how many answers came before."""
    count = 0
    for _ in range(30):
        ping = wire.Ping(wire.next_id(), b"")
        channel.send(wire.pack(ping))
        # Where too many wait, a ping is refused like anything else.
        while (frames := channel.receive(1)) is not None:
            message, _ = wire.unpack(frames)
            if isinstance(message, wire.Pong) and message.id == ping.id:
                return count
            count += 1
    raise AssertionError("the worker does not answer")


def attack(
    case: Case, worker: FastWorker, plugins: Plugins, channel: Channel, recorded: list[list[bytes]], model: Checkpoint,
    *, messages: int, seed: int, progress: Callable[[int], None] = lambda _: None,
) -> Report:  # fmt: skip
    """Send ``messages`` messages that were made of ``recorded`` ones, and LoRAs for ``model`` between them.

    Args:
        channel: of another member than the honest one.
    """
    mutator = Mutator(recorded, seed)
    loras = HostileLoras(model, mutator, seed)
    opening = [kinds(recorded)[kind] for kind in ("open", "constants")]
    answered = sent = made = 0
    with honest_host(case, worker.address, plugins) as honest:
        before, most = worker.resident(), 0
        while sent < messages:
            channel.send(mutator.message())
            sent += 1
            if sent % _LORA_EVERY == 0:
                made += 1
                for frames in loras.messages():
                    channel.send(frames)
                    sent += 1
            answered += drain(channel)
            if sent // _LOOK_EVERY > (sent - 1) // _LOOK_EVERY:
                # A mutated message may have closed the session, and only an open one looks at what comes.
                for frames in opening:
                    channel.send(frames)
                answered += all_is_read(channel)
                most = max(most, worker.resident())
                progress(sent)
        answered += all_is_read(channel)
    return Report(sent, answered, made, max(most, worker.resident()) - before, honest)
