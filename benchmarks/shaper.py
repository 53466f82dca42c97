"""A link of a chosen rate in user space: a TCP relay on loopback that lets bytes through as a slow network would.

For systems without traffic control, and for tests. Both directions have the rate each, shared by all connections.
Knows nothing of what it carries.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import AbstractContextManager, suppress
from types import TracebackType

_PIECE = 64 << 10
_CREDIT = 0.004
"""Seconds of rate that may be made up for: a sleep lasts longer than it was asked to."""


class Shaper(AbstractContextManager["Shaper"]):
    """Relays to ``host``:``port`` while the context lasts.

    Args:
        rate: bytes per second, each way. May be changed while bytes flow.

    Attributes:
        port: where it listens on 127.0.0.1.
    """

    def __init__(self, host: str, port: int, rate: float) -> None:
        self.rate = rate
        self.port = 0
        self._target = host, port
        self._free = [0.0, 0.0]
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._work, name="shaper", daemon=True)

    def __enter__(self) -> Shaper:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        relays: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            relays.add(self._loop.create_task(self._relay(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=4 * _PIECE)
        self.port = int(server.sockets[0].getsockname()[1])
        self._ready.set()
        await self._stop.wait()
        server.close()
        for relay in relays:
            relay.cancel()
        await asyncio.gather(*relays, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*self._target, limit=4 * _PIECE)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(self._carry(reader, back, 0), self._carry(there, writer, 1))
        finally:
            writer.close()
            back.close()

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, direction: int) -> None:
        with suppress(OSError):
            while data := await source.read(_PIECE):
                now = self._loop.time()
                begins = max(now - _CREDIT, self._free[direction])
                self._free[direction] = begins + len(data) / self.rate
                if self._free[direction] > now:
                    await asyncio.sleep(self._free[direction] - now)
                target.write(data)
                await target.drain()
        # The other direction may still have something to say.
        with suppress(OSError):
            if target.can_write_eof():
                target.write_eof()
