"""Large frames of a connection within one machine, in memory that both ends share; all else crosses as before.

Whoever connects offers memory as its first message, and the listener's first answer takes it or declines. It is offered
and taken only where the encrypted handshake has proven that both ends hold the keys of the same user, which lie in a
file that only this user can read; and it is used only once the listener has answered with what stands in the memory
alone, so that both are on one machine. An end that knows nothing of this answers an offer in some other way: then
nothing is shared.

A message with frames in memory says where they lie: number of the frame, and `SlotPlace`. It crosses the socket as
every message, which keeps the order; a frame that finds no room crosses there itself.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextlib import suppress

from mesh_core.errors import WireMalformed
from mesh_core.system.config import parse_bytes
from mesh_core.system.logs import logger
from mesh_core.transport.shared_memory import SharedMemory, available
from mesh_core.transport.slots import SlotPlace, SlotReader, SlotWriter
from mesh_core.wire.limits import MessageLimits

log = logger(__name__)

ROOM = 256 << 20
"""Bytes for each direction of a connection. Taken from the system only as far as messages need them."""

SWITCH = "MESH_SHARED_MEMORY"
"""Environment variable: another size, or 0 to share nothing."""

NAME = "shared memory"
"""What people read."""

_WORTH_IT = 64 << 10
"""Bytes from which a frame goes through the memory."""

_MARK = b"\xc1mesh-memory 1 "
"""Begins what this module sends; 0xc1 begins no message of msgpack."""

_OFFER, _ANSWER, _MESSAGE = (_MARK + kind for kind in (b"offer", b"answer", b"placed"))
_PAGE = 4096
_OFFERED = struct.Struct("<IIQ")
_PLACED = struct.Struct("<HHQQQ")


class MemoryLink:
    """One end of a connection that shares memory.

    Args:
        direction: of the area that this end writes to: 0 for the memory's maker, 1 for the other.
    """

    def __init__(self, memory: SharedMemory, direction: int) -> None:
        self.memory = memory
        self._writer, self._reader = SlotWriter(memory, direction), SlotReader(memory, 1 - direction)

    def outgoing(self, frames: list[memoryview]) -> list[memoryview]:
        """The message that crosses the socket in place of ``frames``."""
        rest, placed = frames[:1], b""
        for number, frame in enumerate(frames[1:], 1):
            place = self._writer.put(frame) if frame.nbytes >= _WORTH_IT else None
            if place is None:
                rest.append(frame)
            else:
                placed += _PLACED.pack(number, *place)
        return [memoryview(_MESSAGE + placed), *rest] if placed else frames

    def incoming(self, frames: list[memoryview], limits: MessageLimits) -> list[memoryview]:
        """The message for which ``frames`` came; the other end's `outgoing`.

        Raises:
            WireMalformed: it says something of the memory that cannot be.
        """
        if not _begins(frames, _MESSAGE):
            return frames
        places, rest = _places(frames[0]), frames[1:]
        total = len(places) + len(rest)
        size = sum(place.size for place in places.values()) + sum(frame.nbytes for frame in rest)
        if not rest or total > limits.buffers + 1 or size > limits.message or max(places) >= total:
            raise WireMalformed("A message says that more lies in a shared memory than a message can hold.")
        inline = iter(rest)
        return [self._reader.take(places[n]) if n in places else next(inline) for n in range(total)]

    def not_sent(self, frames: list[memoryview]) -> None:
        """What `outgoing` made was dropped."""
        if _begins(frames, _MESSAGE):
            for place in _places(frames[0]).values():
                self._writer.take_back(place.slot)


class MemoryOffer:
    """What whoever connects knows of sharing memory over its connection.

    Attributes:
        frames: the offer, to be sent first.
        waiting: the next message is its answer.
        link: once it is taken.
    """

    def __init__(self, room: int) -> None:
        """Raises OSError: the system has no memory to share."""
        self._memory = SharedMemory.make(room)
        self._memory.hold()
        offered = _OFFERED.pack(self._memory.maker, self._memory.number, room)
        self.frames = [memoryview(_OFFER + offered)]
        self.waiting = True
        self.link: MemoryLink | None = None

    def answered(self, frames: list[memoryview]) -> None:
        """The answer came."""
        self.waiting = False
        if _begins(frames, _ANSWER) and bytes(frames[0][len(_ANSWER) :]) == self._memory.nonce:
            self.link = MemoryLink(self._memory, 0)
        else:
            said = bytes(frames[0][len(_ANSWER) :]).decode(errors="replace") if _begins(frames, _ANSWER) else "unknown"
            log.debug("no memory is shared: %r", said[:200])
            self._memory.close()

    def close(self) -> None:
        """Tell the other end that nothing follows. May be called twice."""
        self._memory.close()


class MemoryLinks:
    """Those of a listener, by route. One thread takes messages; any may ask for a link.

    Args:
        key: that proves the listener's own user; "" to share with nobody.
    """

    def __init__(self, key: str, limits: MessageLimits, most: int = 64) -> None:
        self._key, self._limits, self._most = key, limits, most
        self._links: dict[bytes, MemoryLink] = {}

    def get(self, route: bytes) -> MemoryLink | None:
        """The link to the peer of a route."""
        return self._links.get(route)

    def incoming(self, route: bytes, frames: list[memoryview]) -> list[memoryview]:
        """As `MemoryLink.incoming`. Raises WireMalformed, also where nothing is shared."""
        link = self._links.get(route)
        if link is not None:
            return link.incoming(frames, self._limits)
        if _begins(frames, _MESSAGE):
            raise WireMalformed("A message says that a part of it lies in a shared memory, and none is shared.")
        return frames

    def answer(self, route: bytes, key: str, frames: list[memoryview]) -> list[memoryview] | None:
        """The answer to an offer of whoever proved ``key``; None where ``frames`` are none."""
        if not _begins(frames, _OFFER):
            return None
        self.sweep()
        try:
            return [memoryview(_ANSWER + self._take(route, key, bytes(frames[0][len(_OFFER) :])))]
        except (OSError, ValueError, struct.error, WireMalformed) as error:
            log.debug("an offer of shared memory is declined: %s", error)
            return [memoryview(_ANSWER + str(error).encode()[:200])]

    def sweep(self) -> None:
        """Forget the memory of connections that are gone."""
        for route, link in list(self._links.items()):
            if link.memory.abandoned():
                self._links.pop(route)
                link.memory.close()

    def close(self) -> None:
        """Forget all of it. May be called twice."""
        while self._links:
            self._links.popitem()[1].memory.close()

    def _take(self, route: bytes, key: str, said: bytes) -> bytes:
        maker, number, room = _OFFERED.unpack(said)
        if not key or key != self._key:
            raise WireMalformed("only with processes of the same user")
        if room > ROOM or route in self._links or len(self._links) >= self._most:
            raise WireMalformed("no more memory is shared")
        memory = SharedMemory.open(maker, number, room)
        self._links[route] = MemoryLink(memory, 1)
        return memory.nonce


def room() -> int:
    """Bytes for each direction, as the user wants it.

    Raises:
        ConfigError: the environment says something that is no size.
    """
    said = os.environ.get(SWITCH, "")
    return min(ROOM, parse_bytes(said) // _PAGE * _PAGE) if said else ROOM


def offer(room: int) -> MemoryOffer | None:
    """Memory for a connection that is new; None where this system has none, or none is wanted (``room`` 0)."""
    if room and available():
        with suppress(OSError):
            return MemoryOffer(room)
    return None


def _begins(frames: Sequence[memoryview], mark: bytes) -> bool:
    return bool(frames) and frames[0][: len(mark)] == mark


def _places(said: memoryview) -> dict[int, SlotPlace]:
    """Where frames lie, by their numbers. Raises WireMalformed: it is no such list."""
    rows = said[len(_MESSAGE) :]
    if rows.nbytes % _PLACED.size or not 0 < rows.nbytes <= _PLACED.size * 256:
        raise WireMalformed("A message does not say where in a shared memory its frames lie.")
    found = {number: SlotPlace(*place) for number, *place in _PLACED.iter_unpack(rows)}
    if len(found) * _PLACED.size != rows.nbytes or 0 in found:
        raise WireMalformed("A message names a frame in a shared memory twice, or one that never is there.")
    return found
