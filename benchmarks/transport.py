"""What the mesh transport costs next to bare ZeroMQ: 33 MB messages and small ones, there and back, on loopback.

    python -m benchmarks.transport [--rounds 20]

Each echo runs in a process of its own. The rounds of the mesh and of bare ZeroMQ alternate, so that both see the same
machine. A rate counts the bytes of both directions; the table gives the median and the best round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from threading import Thread
from time import perf_counter

import zmq

from mesh_core.transport.base import Address
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.zeromq import ZeroMqTransport

LARGE = 33_554_432
SMALL_TURNS = 200
Turn = Callable[[bytes | bytearray], None]


def mesh_echo(pipe: Connection, home: Path, insecure: bool) -> None:
    """Answer from a second thread when the header says so, as a worker's computing thread does."""
    work: SimpleQueue[tuple[bytes, list[memoryview]]] = SimpleQueue()

    def compute() -> None:
        while True:
            listener.send(*work.get())

    listener = ZeroMqTransport(KeyStore(home), shared=0).listen("mesh://127.0.0.1:0", insecure=insecure)
    pipe.send(listener.address)
    Thread(target=compute, daemon=True).start()
    while got := listener.receive(60):
        peer, frames = got
        if frames[0].tobytes() == b"thread":
            work.put((peer.route, frames))
        else:
            listener.send(peer.route, frames)


def bare_echo(pipe: Connection, secret: bytes | None) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        if secret is not None:
            socket.curve_server, socket.curve_secretkey = 1, secret
        pipe.send(socket.bind_to_random_port("tcp://127.0.0.1"))
        while True:
            socket.send_multipart(socket.recv_multipart(copy=False), copy=False)


def timed(turn: Turn, payload: bytes | bytearray, turns: int) -> float:
    """Seconds of one turn."""
    started = perf_counter()
    for _ in range(turns):
        turn(payload)
    return (perf_counter() - started) / turns


def measure(encrypted: bool, rounds: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = multiprocessing.Pipe()
    home = Path(tempfile.mkdtemp())
    KeyStore(home).identity()
    public, secret = zmq.curve_keypair()
    mesh = spawn.Process(target=mesh_echo, args=(theirs, home, not encrypted), daemon=True)
    mesh.start()
    transport = ZeroMqTransport(KeyStore(home))
    channel = transport.connect(Address(ours.recv()), 20)
    bare = spawn.Process(target=bare_echo, args=(theirs, secret if encrypted else None), daemon=True)
    bare.start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    if encrypted:
        socket.curve_serverkey = public
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.connect(f"tcp://127.0.0.1:{ours.recv()}")

    def through_mesh(payload: bytes | bytearray) -> None:
        channel.send([b"header", payload])
        assert channel.receive(60)

    def through_thread(payload: bytes | bytearray) -> None:
        channel.send([b"thread", payload])
        assert channel.receive(60)

    def through_bare(payload: bytes | bytearray) -> None:
        socket.send_multipart([b"header", payload], copy=len(payload) < 1000)
        socket.recv_multipart(copy=False)

    turns = {"mesh": through_mesh, "mesh, answered by another thread": through_thread, "bare ZeroMQ": through_bare}
    large: dict[str, list[float]] = {name: [] for name in turns}
    small: dict[str, list[float]] = {name: [] for name in turns}
    payload = bytearray(LARGE)
    for _ in range(rounds):
        for name, turn in turns.items():
            large[name].append(2 * LARGE / 1e6 / timed(turn, payload, 1))
            small[name].append(timed(turn, b"x", SMALL_TURNS) * 1e6)
    print(f"\n{'CURVE' if encrypted else 'plain'}{'':28} 33 MB median  best MB/s   small median  best us")
    for name in turns:
        rates, times = large[name], small[name]
        print(f"{name:32} {median(rates):13.0f} {max(rates):10.0f} {median(times):14.0f} {min(times):8.0f}")
    channel.close()
    context.destroy(linger=0)
    transport.close()
    for process in (mesh, bare):
        process.terminate()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    for encrypted in (False, True):
        measure(encrypted, rounds)


if __name__ == "__main__":
    main()
