"""The mesh transport in the open: who gets in, what is refused by which name, and that strangers disturb nobody."""

from __future__ import annotations

import gc
import os
import random
import socket
import subprocess
import sys
import threading
from time import monotonic, sleep

import pytest
import zmq

from mesh_core.errors import ConfigError, NotAuthorised, PeerLost, TransportError, Unreachable
from mesh_core.testing.listeners import ListenerThread, ask
from mesh_core.transport.base import Address, Listener, Peer
from mesh_core.transport.curve import new_key_pair
from mesh_core.transport.zeromq import ZeroMqTransport
from mesh_core.wire import MessageLimits

from .conftest import LOOPBACK, Bench, port_of


def test_the_same_user_on_the_same_machine_needs_nothing(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    channel = bench.connect(bench.mesh(), serving.address)
    assert ask(channel, [b"x"]) == [b"x"]
    assert serving.peers[0].trust == "member"
    assert serving.peers[0].key == bench.keys("owner").identity().client.public


def test_a_key_that_is_authorised_while_the_worker_runs_gets_in(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    guest = bench.mesh("guest")
    address = Address(serving.address.text, bench.keys("owner").identity().server.public)
    bench.keys("owner").authorise(bench.keys("guest").identity().client.public, "guest")
    assert ask(bench.connect(guest, address), [b"x"]) == [b"x"]


def test_a_key_that_is_revoked_is_refused_while_connected_and_afterwards(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    owner, guest = bench.keys("owner"), bench.mesh("guest")
    owner.authorise(bench.keys("guest").identity().client.public, "guest")
    address = Address(serving.address.text, owner.identity().server.public)
    channel = bench.connect(guest, address)
    assert ask(channel, [b"x"]) == [b"x"]
    seen = len(serving.peers)
    owner.revoke("guest")
    channel.send([b"x"])
    with pytest.raises(NotAuthorised, match="any more"):
        channel.receive(10)
    assert len(serving.peers) == seen
    with pytest.raises(NotAuthorised):
        guest.connect(address, 10)
    assert ask(bench.connect(bench.mesh(), serving.address), [b"owner"]) == [b"owner"]


def test_a_neighbour_gets_in_from_admit_to_dismiss(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    neighbour, key = bench.mesh("neighbour"), bench.keys("neighbour").identity().client.public
    address = Address(serving.address.text, bench.keys("owner").identity().server.public)
    serving.listener.admit(key)
    channel = bench.connect(neighbour, address)
    assert ask(channel, [b"x"]) == [b"x"]
    assert serving.peers[-1].trust == "neighbour"
    serving.listener.dismiss(key)
    serving.listener.dismiss(key)
    channel.send([b"x"])
    with pytest.raises(NotAuthorised):
        channel.receive(10)
    with pytest.raises(NotAuthorised):
        neighbour.connect(address, 10)


def test_two_workers_in_one_process_have_their_own_neighbours(bench: Bench) -> None:
    transport = bench.mesh()
    first, second = bench.serve(transport, LOOPBACK), bench.serve(transport, LOOPBACK)
    key = bench.keys("neighbour").identity().client.public
    server = bench.keys("owner").identity().server.public
    first.listener.admit(key)
    neighbour = bench.mesh("neighbour")
    assert ask(bench.connect(neighbour, Address(first.address.text, server)), [b"x"]) == [b"x"]
    with pytest.raises(NotAuthorised):
        neighbour.connect(Address(second.address.text, server), 10)


def test_unreadable_keys_refuse_everybody_else_and_stop_nothing(bench: Bench, tmp_path: object) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    owner = bench.keys("owner")
    owner.authorise(bench.keys("guest").identity().client.public, "guest")
    address = Address(serving.address.text, owner.identity().server.public)
    channel = bench.connect(bench.mesh("guest"), address)
    assert ask(channel, [b"x"]) == [b"x"]
    next(iter(tmp_path.glob("owner/authorised*"))).write_text("{")  # type: ignore[attr-defined]
    channel.send([b"x"])
    with pytest.raises(NotAuthorised):
        channel.receive(10)
    assert ask(bench.connect(bench.mesh(), serving.address), [b"owner"]) == [b"owner"]


def test_without_encryption_both_ends_must_say_so(bench: Bench) -> None:
    transport = bench.mesh()
    plain = bench.serve(transport, LOOPBACK, insecure=True)
    coded = bench.serve(transport, LOOPBACK)
    assert plain.address.text.endswith("?insecure=yes")
    assert ask(bench.connect(bench.mesh("stranger"), plain.address), [b"x"]) == [b"x"]
    assert plain.peers[0].key == ""
    with pytest.raises(NotAuthorised, match="without encryption"):
        transport.connect(Address(plain.address.text.partition("?")[0]), 10)
    with pytest.raises(NotAuthorised, match="with encryption"):
        transport.connect(Address(coded.address.text + "?insecure=yes"), 10)


def test_without_encryption_on_all_addresses_needs_force(bench: Bench) -> None:
    transport = bench.mesh()
    for address in ("mesh://0.0.0.0:0", "mesh://[::]:0", "mesh://192.0.2.7:0", "mesh://example.org:0"):
        with pytest.raises(ConfigError, match="Without encryption"):
            transport.listen(address, insecure=True)
    listener = transport.listen("mesh://0.0.0.0:0", insecure=True, force=True)
    listener.close()
    for address in ("mesh://localhost:0", "mesh://127.3.2.1:0"):
        transport.listen(address, insecure=True).close()


@pytest.mark.skipif(not socket.has_ipv6, reason="Python was built without IPv6")
def test_ipv6(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), "mesh://[::1]:0")
    assert serving.address.text.startswith("mesh://[::1]:")
    assert ask(bench.connect(bench.mesh(), serving.address), [b"x"]) == [b"x"]


def test_a_name_reaches_a_worker_that_listens_on_one_of_its_addresses(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    address = Address(f"mesh://localhost:{port_of(serving)}")
    assert ask(bench.connect(bench.mesh(), address), [b"x"]) == [b"x"]


def test_what_cannot_be_reached_says_why(bench: Bench) -> None:
    transport, key = bench.mesh(), new_key_pair()[0]
    with pytest.raises(Unreachable, match="does not resolve"):
        transport.connect(Address("mesh://no-such-machine.invalid:7777", key), 5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="refused"):
            transport.connect(Address(f"mesh://127.0.0.1:{free.getsockname()[1]}", key), 0.2)
    with pytest.raises(ConfigError, match="not known here"):
        transport.connect(Address("mesh://192.0.2.1:7777"), 5)


def test_another_program_at_the_port_is_told_from_a_worker(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as web:

        def answer() -> None:
            for _ in range(3):
                connection, _ = web.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 64)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Unreachable, match="no worker of the mesh"):
            bench.mesh().connect(Address(f"mesh://127.0.0.1:{web.getsockname()[1]}"), 10)
        thread.join()


def test_a_program_that_says_nothing_is_unreachable_within_the_timeout(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        before = monotonic()
        with pytest.raises(Unreachable, match=r"does not answer within 0\.\d s"):
            bench.mesh().connect(Address(f"mesh://127.0.0.1:{silent.getsockname()[1]}"), 0.5)
        assert 0.4 < monotonic() - before < 4


def test_a_second_worker_on_the_port_is_told_which_and_what_to_do(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    with pytest.raises(TransportError, match=str(port_of(serving))) as caught:
        bench.mesh("other").listen(serving.address.text)
    assert "--port" in caught.value.hint
    with pytest.raises(TransportError) as caught:
        bench.mesh().listen("mesh://192.0.2.1:0")
    assert "address of this machine" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["http://a:1", "mesh://", "mesh://a:70000", "mesh://a b", "mesh://a?x=1", "mesh://a?insecure=no"],
)
def test_what_is_no_address_is_a_setting_to_correct(bench: Bench, text: str) -> None:
    with pytest.raises(ConfigError):
        bench.mesh().connect(Address(text), 1)


def test_random_bytes_at_the_port_disturb_nobody(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    channel = bench.connect(bench.mesh(), serving.address)
    dice = random.Random(0)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(47)
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", port_of(serving))) as stranger:
            junk = dice.randbytes(dice.choice([1, 10, 64, 5000]))
            try:
                stranger.sendall(junk if dice.random() < 0.5 else greeting + junk)
            except OSError:
                continue
        assert ask(channel, [b"still", b"here"]) == [b"still", b"here"]
    assert {peer.key for peer in serving.peers} == {bench.keys("owner").identity().client.public}


def test_a_member_that_breaks_the_limits_loses_its_connection_alone(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    good = bench.connect(bench.mesh(), serving.address)
    own = bench.keys("owner").identity()
    with zmq.Context() as context, context.socket(zmq.DEALER) as evil:
        evil.linger = 0
        evil.curve_publickey, evil.curve_secretkey = own.client.public.encode(), own.client.secret.encode()
        evil.curve_serverkey = own.server.public.encode()
        monitor = evil.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        evil.connect(serving.address.text.replace("mesh", "tcp"))
        evil.send(bytes(3 << 20))
        assert monitor.poll(10_000), "the frame was taken"
        evil.disable_monitor()
        monitor.close()
    assert ask(good, [b"x"]) == [b"x"]
    assert len(serving.peers) == 1


def test_too_many_frames_are_cut_short_but_not_hidden(bench: Bench) -> None:
    counts: list[int] = []

    def count(listener: Listener, peer: Peer, frames: list[memoryview]) -> None:
        counts.append(len(frames))
        listener.send(peer.route, [b"x"])

    limits = MessageLimits(buffers=4)
    serving = bench.serve(bench.mesh(limits=limits), LOOPBACK, count)
    channel = bench.connect(bench.mesh(), serving.address)
    ask(channel, [b"x"] * 5)
    ask(channel, [b"x"] * 500)
    ask(channel, [b"x"] * 2)
    assert counts[0] == 5 and 5 < counts[1] < 10 and counts[2] == 2


@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize("answer", [[bytes(8), bytes(1 << 20)], [bytes(2 << 10)] * 4, [b""] * 1000], ids=len)
def test_the_next_worker_may_send_no_more_than_it_is_to(bench: Bench, insecure: bool, answer: list[bytes]) -> None:
    def reply(listener: Listener, peer: Peer, frames: list[memoryview]) -> None:
        listener.send(peer.route, answer if frames == [b"more"] else frames)

    serving = bench.serve(bench.mesh(), LOOPBACK, reply, insecure=insecure)
    good = bench.connect(bench.mesh(), serving.address)
    replies = MessageLimits(header=4 << 10, buffers=1, buffer=4 << 10, message=4 << 10)
    channel = bench.mesh().connect_onward(serving.address, 5, replies)
    try:
        assert ask(channel, [b"x", bytes(1000)]) == [b"x", bytes(1000)]
        channel.send([b"more"])
        with pytest.raises(PeerLost):
            assert channel.receive(10) is None
        with pytest.raises(PeerLost):
            channel.send([b"x"])
    finally:
        channel.close()
    assert ask(good, [b"x"]) == [b"x"]


WORKER = """
import sys
from pathlib import Path
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.zeromq import ZeroMqTransport
listener = ZeroMqTransport(KeyStore(Path(sys.argv[1]))).listen("mesh://127.0.0.1:0")
print(listener.address, flush=True)
while True:
    got = listener.receive(60)
    if got and bytes(got[1][0]) == b"exit":
        sys.exit()
    if got:
        listener.send(got[0].route, got[1])
"""


def start_worker(home: str) -> tuple[subprocess.Popen[str], Address]:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, home], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert worker.stdout is not None
    return worker, Address(worker.stdout.readline().strip())


def test_a_killed_worker_is_noticed_at_once(bench: Bench, tmp_path: object) -> None:
    worker, address = start_worker(str(tmp_path / "owner"))  # type: ignore[operator]
    with worker:
        channel = bench.connect(bench.mesh(), address)
        assert ask(channel, [b"x", bytearray(5 << 20)])[0] == b"x"
        worker.kill()
        before = monotonic()
        with pytest.raises(PeerLost):
            channel.receive(20)
        assert monotonic() - before < 5


def test_a_process_that_closes_nothing_still_ends(bench: Bench, tmp_path: object) -> None:
    worker, address = start_worker(str(tmp_path / "owner"))  # type: ignore[operator]
    with worker:
        channel = bench.connect(bench.mesh(), address)
        ask(channel, [b"x", bytearray(5 << 20)])
        channel.send([b"exit"])
        assert worker.wait(20) == 0


def test_a_transport_that_nobody_holds_ends_its_threads(bench: Bench) -> None:
    def use() -> None:
        transport = ZeroMqTransport(bench.keys("owner"))
        transport.listen(LOOPBACK).close()

    before = set(threading.enumerate())
    use()
    gc.collect()
    assert set(threading.enumerate()) == before


def test_a_transport_that_is_closed_can_be_used_again(bench: Bench) -> None:
    transport = bench.mesh()
    for _ in range(3):
        serving = ListenerThread(transport.listen(LOOPBACK))
        channel = transport.connect(serving.address, 5)
        assert ask(channel, [b"x"]) == [b"x"]
        channel.close()
        serving.stop()
        transport.close()


def test_closed_listeners_and_channels_leave_no_sockets_behind(bench: Bench) -> None:
    transport = bench.mesh()
    serving = bench.serve(transport, LOOPBACK)
    open_files = f"/proc/{os.getpid()}/fd"

    def use() -> None:
        channel = transport.connect(serving.address, 5)
        ask(channel, [b"x"])
        channel.close()
        transport.listen(LOOPBACK).close()

    use()
    sleep(0.2)
    before = len(os.listdir(open_files)) if os.path.isdir(open_files) else threading.active_count()
    for _ in range(20):
        use()
    sleep(0.2)
    after = len(os.listdir(open_files)) if os.path.isdir(open_files) else threading.active_count()
    assert after <= before + 4


FORGETFUL = """
import gc
from mesh_core.transport.base import Address
from mesh_core.transport.zeromq import ZeroMqTransport

gc.disable()
transport = ZeroMqTransport()
listener = transport.listen("mesh://127.0.0.1:0")
channel = ZeroMqTransport().connect(Address(listener.address), 10)
listener.itself, channel.itself, transport.its = listener, channel, (transport, listener)
del transport, listener, channel
gc.collect()
print("the program goes on")
"""


def test_a_program_that_forgets_to_close_does_not_hang(bench: Bench) -> None:
    """What is unclosed goes in whatever order the garbage collector likes; libzmq would wait for the last socket."""
    done = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "the program goes on", done.stderr
