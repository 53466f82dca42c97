"""The ``mesh`` transport: ZeroMQ over TCP, encrypted with CURVE unless the address says ``?insecure=yes``.

Knows where keys are kept and what they open; nothing of what the messages mean.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from secrets import token_hex
from threading import Lock
from time import monotonic
from typing import ClassVar, cast

import zmq

from mesh_core.errors import ConfigError
from mesh_core.system.handles import raised_limit
from mesh_core.system.logs import logger
from mesh_core.transport.address import Place, is_loopback, numeric, parse_place
from mesh_core.transport.base import Address, Channel, Listener, Transport
from mesh_core.transport.gate import Gate
from mesh_core.transport.keys import KeyPair, KeyStore
from mesh_core.transport.memory_link import MemoryLinks, room
from mesh_core.transport.zmq_channel import ZmqChannel
from mesh_core.transport.zmq_connecting import Caller
from mesh_core.transport.zmq_doors import DoorLimits, Doors
from mesh_core.transport.zmq_errors import mapped_errors
from mesh_core.transport.zmq_listener import ZmqListener
from mesh_core.transport.zmq_process import ZmqProcess
from mesh_core.transport.zmq_refusals import JOIN
from mesh_core.transport.zmq_socket import Socket, Wire, milliseconds
from mesh_core.wire.limits import LIMITS, MessageLimits

log = logger(__name__)


class ZeroMqTransport(Transport):
    """See `Transport`. A forked process gets a context and threads of its own.

    Args:
        keys: whose keys are used; by default the user's, looked up at every use.
        limits: for frames, both ways.
        shared: bytes of memory for each direction that a connection within this machine and user may share; 0 for none,
            None for what the environment says.
    """

    scheme: ClassVar[str] = "mesh"

    def __init__(
        self, keys: KeyStore | None = None, limits: MessageLimits = LIMITS, *, shared: int | None = None
    ) -> None:
        self._keys, self._limits, self._room = keys, limits, shared
        self._running: ZmqProcess | None = None
        self._lock = Lock()

    def resolve(self, address: Address) -> Address:
        place = parse_place(address.text)
        key = "" if place.insecure else self._keys_for(place, address.server_key, None)[1]
        return Address(str(place), key)

    def connect(self, address: Address, timeout: float, *, client: KeyPair | None = None) -> Channel:
        """See `Transport.connect`. ``client``: the keys to call with, in place of the user's own."""
        return self._connect(address, timeout, client)

    def connect_onward(self, address: Address, timeout: float, replies: MessageLimits) -> Channel:
        return self._connect(address, timeout, replies=replies)

    def _connect(
        self, address: Address, timeout: float, client: KeyPair | None = None, replies: MessageLimits | None = None
    ) -> Channel:
        place = parse_place(address.text)
        keys = None if place.insecure else self._keys_for(place, address.server_key, client)
        wire = Wire(self._limits, encrypted=keys is not None, replies=replies)
        return Caller(self._runs().context, place, keys, self._store(), wire, self, self._shared()).connect(timeout)

    def listen(self, address: str, **options: object) -> Listener:
        """See `Transport.listen`.

        Args:
            address: ``mesh://HOST:PORT``; port 0 lets the system choose, host 0.0.0.0 or [::] means all addresses.
            options: ``insecure`` (bool): no encryption, everybody who reaches the port is a member; only on a
                loopback address, unless ``force`` (bool).
        """
        place = self._checked(parse_place(address), dict(options))
        host = numeric(place.host)
        gate = None if place.insecure else Gate(self._store())
        wire = Wire(self._limits, encrypted=gate is not None)
        limits = DoorLimits.within(raised_limit())
        with mapped_errors(f"Listening at {place}"):
            context = self._runs().context
            socket = wire.socket(context, zmq.ROUTER)
            try:
                socket.router_handover = 1
                socket.ipv6 = ":" in host
                domain = self._guard(socket, gate)
                socket.bind(f"tcp://{f'[{host}]' if ':' in host else host}:{place.port}")
                port = int(cast(bytes, socket.getsockopt(zmq.LAST_ENDPOINT)).decode().rstrip("\0").rpartition(":")[2])
                doors = Doors(context, socket, port, limits)
            except BaseException:
                socket.close(linger=0)
                raise
            written, unguard = str(replace(place, port=port)), partial(self._unguard, domain)
            own = gate.keys.identity().client.public if gate is not None and self._shared() else ""
            memories = MemoryLinks(own, self._limits)
            return ZmqListener(context, socket, written, gate, wire, doors, memories, unguard)

    def wait(self, channels: Sequence[Channel], timeout: float) -> list[Channel]:
        ours = cast(Sequence[ZmqChannel], channels)
        deadline = monotonic() + timeout
        while True:
            ready = [channel for channel in ours if channel.ready()]
            left = deadline - monotonic()
            if ready or left <= 0:
                return list(ready)
            poller = zmq.Poller()
            for channel in ours:
                poller.register(channel.socket, zmq.POLLIN)
                poller.register(channel.monitor, zmq.POLLIN)
            with mapped_errors("Waiting for workers"):
                poller.poll(milliseconds(left))

    def close(self) -> None:
        """End the transport's threads. All its channels and listeners must be closed."""
        with self._lock:
            if self._running is not None:
                self._running.close()
            self._running = None

    def _runs(self) -> ZmqProcess:
        """This process's context and its threads: a fork must not use its parent's."""
        with self._lock:
            if self._running is None or self._running.process != os.getpid():
                self._running = ZmqProcess()
                # Not at exit: other threads may still use sockets then, and the process frees all of it.
                weakref.finalize(self, self._running.close).atexit = False
            return self._running

    def _shared(self) -> int:
        return self._room if self._room is not None else room()

    def _store(self) -> KeyStore:
        return self._keys if self._keys is not None else KeyStore()

    def _keys_for(self, place: Place, server_key: str, client: KeyPair | None) -> tuple[KeyPair, str]:
        store = self._store()
        if not server_key:
            known = store.worker(place.netloc)
            if known is not None:
                server_key = known.key
            elif is_loopback(place.host):
                server_key = store.identity().server.public
            else:
                raise ConfigError(
                    f"The key of the worker at {place} is not known here.",
                    hint=JOIN,
                )
        return client or store.identity().client, server_key

    def _checked(self, place: Place, options: dict[str, object]) -> Place:
        insecure = bool(options.pop("insecure", False)) or place.insecure
        force = bool(options.pop("force", False))
        if options:
            raise ConfigError(f"The mesh transport has no option {min(options)!r}.", hint="insecure or force")
        if insecure and not is_loopback(place.host) and not force:
            raise ConfigError(
                f"Without encryption at {place.netloc}, everybody who reaches the port could use this worker.",
                hint="leave out --insecure, bind to 127.0.0.1, or add --force if the network is yours alone",
            )
        if insecure:
            log.warning("listening at %s WITHOUT encryption: whoever reaches the port is trusted", place.netloc)
        return replace(place, insecure=insecure)

    def _guard(self, socket: Socket, gate: Gate | None) -> str:
        """Let only those in that ``gate`` trusts, and prove the user's server key to them; returns the ZAP domain."""
        if gate is None:
            return ""
        domain = f"mesh.{token_hex(8)}"
        server = gate.keys.identity().server
        socket.curve_server = 1
        socket.curve_secretkey = server.secret.encode()
        socket.zap_domain = domain.encode()
        self._runs().zap().add(domain, gate.open_to)
        return domain

    def _unguard(self, domain: str) -> None:
        if domain:
            self._runs().zap().remove(domain)
