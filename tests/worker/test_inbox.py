"""Whose message a worker reads next, however many others wait."""

from __future__ import annotations

from collections import deque
from time import sleep

from mesh_core.transport.base import Frames, Listener, Peer
from mesh_core.worker.inbox import Inbox
from mesh_core.worker.quota import QUOTA


class Post(Listener):
    """A listener that hands out what a test puts in."""

    address = ""

    def __init__(self) -> None:
        self.here: deque[tuple[Peer, list[memoryview]]] = deque()

    def put(self, key: str, text: bytes, times: int = 1) -> None:
        self.here.extend([(Peer(key.encode(), key), [memoryview(text)])] * times)

    def receive(self, timeout: float) -> tuple[Peer, list[memoryview]] | None:
        return self.here.popleft() if self.here else None

    def send(self, route: bytes, frames: Frames) -> None:
        raise AssertionError

    def wake(self) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


class Reader:
    """An inbox, and what was read of it, in order."""

    def __init__(self) -> None:
        self.post = Post()
        self.order: list[str] = []
        self.refused: list[Peer] = []
        self.inbox = Inbox(self.post, lambda peer, error: self.refused.append(peer))

    def read(self, times: int = 1) -> None:
        def read(peer: Peer, frames: list[memoryview]) -> None:
            self.order.append(f"{peer.key} {bytes(frames[0]).decode()}")
            sleep(0.001 * (peer.key == "flood"))

        for _ in range(times):
            self.inbox.read_one(0.0, read)


def test_a_message_is_read_before_a_flood_that_came_first() -> None:
    reader = Reader()
    reader.post.put("flood", b"junk", 500)
    reader.read(10)
    reader.post.put("honest", b"first")
    reader.post.put("honest", b"second")
    reader.read(30)
    assert reader.order.index("honest first") < 20
    assert reader.order.index("honest second") < 25
    reader.read(600)
    assert len(reader.order) == 502


def test_messages_of_one_key_stay_in_their_order() -> None:
    reader = Reader()
    for number in range(100):
        reader.post.put("a" if number % 3 else "b", str(number).encode())
    reader.read(100)
    for key in "ab":
        numbers = [int(read.split()[1]) for read in reader.order if read.startswith(key)]
        assert numbers == sorted(numbers) and len(numbers) > 30


def test_of_one_key_so_many_wait_and_no_more() -> None:
    reader = Reader()
    reader.post.put("flood", b"junk", QUOTA.messages + 500)
    reader.post.put("honest", b"x")
    reader.read(40)
    assert {peer.key for peer in reader.refused} == {"flood"}
    assert "honest x" in reader.order
    reader.read(QUOTA.messages)
    assert len(reader.order) + len(reader.refused) == QUOTA.messages + 501


def test_the_messages_of_one_key_have_so_many_bytes() -> None:
    reader = Reader()
    large = bytes(QUOTA.message_bytes // 4)
    reader.post.put("flood", large, 6)
    reader.inbox.read_one(0.0, lambda peer, frames: reader.order.append(peer.key))
    assert len(reader.refused) == 2
