"""What one greedy member, or the holder of an invite, does to have a worker to itself: one function for each way.

Each takes an `Attacker` and returns when it has sent all; whether the worker refuses it is not looked at.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any

import msgpack
import torch
from blake3 import blake3

from mesh_codec.base import Encoded
from mesh_core import wire
from mesh_core.crossing.constants import digest
from mesh_core.loras.part import MARK
from mesh_core.model.fingerprint import structure
from mesh_core.model.library import Checkpoint
from mesh_core.plugins.registry import Plugins
from mesh_core.transport.base import Address, Channel, Frame
from mesh_core.transport.invites import create_invite, parse_invite
from mesh_core.transport.keys import KeyPair, KeyStore
from mesh_core.transport.zeromq import ZeroMqTransport
from tests.faults.processes import FastWorker

Edit = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Attacker:
    """A member that sends what it likes.

    Attributes:
        real: a real message of each type, as frames.
        folder: of its own.
        over: set when the attack need not go on.
    """

    channel: Channel
    real: dict[str, list[bytes]]
    worker: FastWorker
    model: Checkpoint
    plugins: Plugins
    folder: Path
    over: threading.Event = field(default_factory=threading.Event)

    def send(self, kind: str, edit: Edit = lambda _: None, buffers: list[bytes] | None = None) -> None:
        """A real message with some of its header, and its buffers, changed."""
        frames = self.real[kind]
        header = msgpack.unpackb(frames[0])
        edit(header)
        buffers = frames[1:] if buffers is None else buffers
        header["b"] = [len(b) for b in buffers]
        self.channel.send([msgpack.packb(header), *buffers])

    def drain(self, seconds: float) -> None:
        """Take what comes for so long."""
        while self.channel.receive(seconds) is not None:
            pass


def measures_a_liar(attacker: Attacker) -> None:
    """Every loading thread is to measure the way to a neighbour that answers each probe wrongly."""
    with _liar(attacker.plugins, wire.pack(wire.Probed(0))) as following:
        for number in range(4):
            _open_before(attacker, number, following, {"measure": True})
        attacker.over.wait(40)


def floods_as_the_next_worker(attacker: Attacker) -> None:
    """What the sessions handed on is answered with long lists, as fast as they can be sent."""
    _flood_back(attacker, wire.pack(wire.LorasListed(1, [{"a": [[] for _ in range(15)]} for _ in range(4095)])), 0.01)


def sends_much_as_the_next_worker(attacker: Attacker) -> None:
    """What the sessions handed on is answered with what is large and nobody reads."""
    _flood_back(attacker, wire.pack(wire.Probed(1), [bytes(16 << 20)]), 0.1)


def _flood_back(attacker: Attacker, sent: list[Frame], pause: float) -> None:
    with _liar(attacker.plugins, sent, pause) as following:
        for number in range(3):
            session = _open_before(attacker, number, following, {})
            attacker.drain(1.0)
            attacker.send("constants", lambda header, session=session: header.update(session=session))
            for step, deadline in ((1, 1), (2, 300_000)):
                attacker.send(
                    "step",
                    lambda header, session=session, step=step, deadline=deadline: header.update(
                        session=session, step=step, deadline_ms=deadline
                    ),
                )
        attacker.over.wait(40)


def _open_before(attacker: Attacker, number: int, following: dict[str, Any], options: dict[str, Any]) -> bytes:
    session = number.to_bytes(16, "big")
    attacker.send("open", lambda header: header.update(session=session, next=following, options=options))
    return session


@contextmanager
def _liar(plugins: Plugins, sent: list[Frame], pause: float = 0.1) -> Iterator[dict[str, Any]]:
    """Somebody who sends the same to everybody all the time; what a request says of him as the next worker."""
    listener = plugins.transport("mesh").listen("mesh://127.0.0.1:0")
    over = threading.Event()

    def serve() -> None:
        routes = set()
        while not over.is_set():
            got = listener.receive(pause)
            if got is not None:
                routes.add(got[0].route)
            for route in routes:
                listener.send(route, sent)
        # libzmq ends the process where a connection breaks in a message while its listener is closed: let them break.
        sleep(1.0)
        listener.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield {
            "address": listener.address,
            "server_key": KeyStore().identity().server.public,
            "session": bytes(16),
        }
    finally:
        over.set()
        thread.join(10)


def keeps_constants_of_nothing(attacker: Attacker) -> None:
    """Tens of thousands of constants without elements."""
    attacker.send("open")
    attacker.drain(1.0)
    for message in range(40):
        entries = []
        for number in range(600):
            header = {"dtype": "float32", "shape": [0, message * 600 + number]}
            name = digest(Encoded(header, [b""]))
            entries.append({"hash": name, "n": "constant", "c": "raw", "s": {}, "h": header, "k": 0})
        attacker.send("constants", lambda m, entries=entries: m.update(tensors=entries), [])
    attacker.drain(2.0)


def sends_a_lora_that_is_all_head(attacker: Attacker) -> None:
    """A file of 60 MB whose head, which is JSON, is nearly all of it."""
    entries = {str(i): {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(900_000)}
    _send_file(attacker, json.dumps(entries).encode(), bytes(4))


def sends_a_lora_of_many_patches(attacker: Attacker) -> None:
    """Thousands of patches that all use the same two tensors."""
    name, facts = next((n, p) for n, p in attacker.model.spec.parameters.items() if ".to_q." in n)
    rows, columns = facts.shape
    patch = ["lora", [[name, 0, rows]], None, None, {"down": 0, "up": 1}]
    down, up = bytes(4 * 3 * columns), bytes(4 * 3 * rows)
    entries = {
        "__metadata__": {
            "format": MARK,
            "patches": json.dumps([patch] * 20_000),
            "hashes": json.dumps([blake3(down).hexdigest(), blake3(up).hexdigest()]),
        },
        "0": {"dtype": "F32", "shape": [3, columns], "data_offsets": [0, len(down)]},
        "1": {"dtype": "F32", "shape": [rows, 3], "data_offsets": [len(down), len(down) + len(up)]},
    }
    for _ in range(3):
        _send_file(attacker, json.dumps(entries).encode(), down + up)


def _send_file(attacker: Attacker, head: bytes, tensors: bytes) -> None:
    data = struct.pack("<Q", len(head)) + head + tensors
    spec, name = attacker.model.spec, blake3(data).hexdigest()
    offer = wire.Offer(wire.next_id(), name, name, len(data), spec.family, structure(spec), "greedy")
    attacker.channel.send(wire.pack(offer))
    for start in range(0, len(data), 4 << 20):
        attacker.channel.send(wire.pack(wire.Chunk(wire.next_id(), name, start), [data[start : start + (4 << 20)]]))
    attacker.drain(3.0)


def sends_a_little_that_becomes_much(attacker: Attacker) -> None:
    """A step of some KB that decodes to a state of a GB, again and again."""
    codec = attacker.plugins.codec("lossless")
    settings = codec.settings("lossless", codec.capabilities())
    agreed = {"codec": "lossless", "settings": settings}

    def compressed(header: dict[str, Any]) -> None:
        for direction in ("inputs", "outputs"):
            header[direction] = dict.fromkeys(header[direction], agreed)

    attacker.send("open", compressed)
    attacker.send("constants")
    attacker.drain(1.0)
    entries, buffers = [], []
    for entry in msgpack.unpackb(attacker.real["step"][0])["tensors"]:
        shape = list(entry["h"]["shape"])
        shape[1] = 1 << 20
        coded = codec.encoder(settings).encode(torch.zeros(shape))
        entries.append({**entry, "c": "lossless", "s": settings, "h": coded.header, "k": len(coded.buffers)})
        buffers += [bytes(b) for b in coded.buffers]
    for number in range(20, 26):
        attacker.send("step", lambda m, number=number: m.update(step=number, tensors=entries), buffers)
    attacker.drain(3.0)


def floods_with_nulls_on_an_invite(attacker: Attacker) -> None:
    """Headers of a MiB that hold nothing but nulls, from somebody who is no member yet."""
    invite = parse_invite(str(create_invite(attacker.worker.address)))
    store = KeyStore(attacker.folder / "stranger")
    transport = ZeroMqTransport(store)
    from mesh_core.transport.curve import public_of

    keys = KeyPair(public_of(invite.token), invite.token)
    channel = transport.connect(Address(attacker.worker.address, invite.server_key), 5, client=keys)
    try:
        nulls = b"\xdd" + struct.pack(">I", 1_000_000) + b"\xc0" * 1_000_000
        for _ in range(40):
            channel.send([nulls])
            channel.send([b"\x84\xa1v\x01\xa1t\xa5hello\xa1b\x90\xa1x" + nulls])
        sleep(3.0)
    finally:
        channel.close()
        transport.close()


def offers_more_than_is_kept(attacker: Attacker) -> None:
    """Transfers that begin and never end, each of nearly the whole library."""
    spec = attacker.model.spec
    for number in range(40):
        name = blake3(bytes([number])).hexdigest()
        size = 7 << 30
        offer = wire.Offer(wire.next_id(), name, name, size, spec.family, structure(spec), "greedy")
        attacker.channel.send(wire.pack(offer))
        attacker.channel.send(wire.pack(wire.Chunk(wire.next_id(), name, 0), [bytes(4 << 20)]))
    attacker.drain(2.0)


def asks_for_bytes_and_reads_none(attacker: Attacker) -> None:
    """Measures the link hundreds of times at once."""
    for _ in range(300):
        attacker.channel.send(wire.pack(wire.Probe(wire.next_id(), wire.PROBE_BYTES)))
    sleep(3.0)


WAYS: tuple[Callable[[Attacker], None], ...] = (
    measures_a_liar,
    floods_as_the_next_worker,
    sends_much_as_the_next_worker,
    keeps_constants_of_nothing,
    sends_a_lora_that_is_all_head,
    sends_a_lora_of_many_patches,
    sends_a_little_that_becomes_much,
    floods_with_nulls_on_an_invite,
    offers_more_than_is_kept,
    asks_for_bytes_and_reads_none,
)
