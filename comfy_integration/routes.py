"""What the page asks for: the workers that are known here, and what the nodes are doing.

A connection is only made by a POST, to a worker that is known already or named by an invite in the body; never to
an address in a query string. Work that waits for a network runs in a thread, so the page stays alive. Every route
answers the page of this ComfyUI only, see `callers`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from mesh_codec.errors import CodecError
from mesh_core.errors import ConfigError, MeshError, NotAuthorised
from mesh_core.system.config import Settings
from mesh_core.system.logs import logger
from mesh_core.transport.keys import KeyStore, KnownWorker
from mesh_core.visible import visible_values

from .callers import check_caller
from .pack_state import PackState
from .workers import choices, label

if TYPE_CHECKING:
    from mesh_core.host.remote import Remote

log = logger(__name__)

_LONGEST = 2000
_LARGEST = 16 << 10
"""Bytes of the body of a request."""

_BODY = msgspec.json.Decoder(dict[str, str])
_TEST_WITHIN = 5.0

Handler = Callable[[web.Request], Awaitable[web.Response]]


def add_routes(routes: web.RouteTableDef, pack: PackState) -> None:
    """Add this pack's routes, all under /mesh."""

    @routes.get("/mesh/status")
    @_for_the_page
    async def status(request: web.Request) -> Any:
        return {"nodes": pack.status.all(), "message": pack.message}

    @routes.get("/mesh/workers")
    @_for_the_page
    async def workers(request: web.Request) -> Any:
        return {"workers": _listed(), "choices": choices()}

    @routes.post("/mesh/workers")
    @_answers
    async def join(body: dict[str, str]) -> Any:
        from mesh_core.transport.invites import accept_invite

        invite = _text(body, "invite").removeprefix("mesh join ").strip().strip('"')
        worker = await asyncio.to_thread(accept_invite, invite)
        return {"added": label(worker), "workers": _listed(), "choices": choices()}

    @routes.post("/mesh/workers/rename")
    @_answers
    async def rename(body: dict[str, str]) -> Any:
        name = _text(body, "name")
        if not name.isprintable() or not 0 < len(name) <= 100:
            raise ConfigError("A worker's name is one line of at most 100 characters.")
        KeyStore().remember(replace(_known(_text(body, "address")), name=name))
        return {"workers": _listed(), "choices": choices()}

    @routes.post("/mesh/workers/remove")
    @_answers
    async def remove(body: dict[str, str]) -> Any:
        KeyStore().forget(_known(_text(body, "address")).address)
        return {"workers": _listed(), "choices": choices()}

    @routes.post("/mesh/workers/test")
    @_answers
    async def test(body: dict[str, str]) -> Any:
        return await asyncio.to_thread(_tried, _known(_text(body, "address")), pack)

    @routes.post("/mesh/loras")
    @_answers
    async def loras(body: dict[str, str]) -> Any:
        return await asyncio.to_thread(_loras_of, _known(_text(body, "address")), pack)


def _for_the_page(handler: Callable[[web.Request], Awaitable[Any]]) -> Handler:
    """A handler that other sites' pages do not reach, and whose errors are told to the page."""

    async def answer(request: web.Request) -> web.Response:
        try:
            try:
                check_caller(request.headers, (*_listens_at(), *Settings.load().comfy.hosts))
            except NotAuthorised as error:
                log.warning("%s", error)
                return _told(error, 403)
            return web.json_response(await handler(request))
        except (MeshError, CodecError) as error:
            return _told(error, 400)

    return answer


def _told(error: MeshError | CodecError, status: int) -> web.Response:
    return web.json_response(visible_values({"error": error.message, "hint": error.hint}), status=status)


def _answers(handler: Callable[[dict[str, str]], Awaitable[Any]]) -> Handler:
    """The same, of a JSON object of texts."""

    @_for_the_page
    async def answer(request: web.Request) -> Any:
        if request.query_string or request.content_type != "application/json":
            raise ConfigError("A JSON object in the body is expected.")
        data = bytearray()
        async for piece in request.content.iter_any():
            data += piece
            if len(data) > _LARGEST:
                raise ConfigError(f"A request is at most {_LARGEST} bytes.")
        try:
            body = _BODY.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError("The request is no JSON object of texts.") from error
        return await handler(body)

    return answer


def _listens_at() -> list[str]:
    """What the user told ComfyUI to listen at, which may be a name."""
    from comfy.cli_args import args

    return [place.strip() for place in str(args.listen).split(",") if place.strip(". ")]


def _text(body: dict[str, str], name: str) -> str:
    value = body.get(name)
    if value is None or len(value) > _LONGEST:
        raise ConfigError(f"{name} must be text of at most {_LONGEST} characters.")
    return value.strip()


def _known(address: str) -> KnownWorker:
    worker = KeyStore().worker(address)
    if worker is None:
        raise ConfigError("No such worker is known here.", hint="paste its invite first")
    return worker


def _listed() -> list[dict[str, str]]:
    return [{"name": w.name, "address": w.address, "label": label(w)} for w in KeyStore().workers()]


@contextmanager
def _connected(worker: KnownWorker, pack: PackState) -> Iterator[Remote]:
    from mesh_core.host.remote import Remote
    from mesh_core.transport.base import Address

    remote = Remote(Address(f"mesh://{worker.address}"), pack.plugins, Settings.load())
    try:
        remote.connect(_TEST_WITHIN)
        yield remote
    finally:
        remote.close()


def _loras_of(worker: KnownWorker, pack: PackState) -> dict[str, Any]:
    from mesh_core.host.kept_loras import listed

    with _connected(worker, pack) as remote:
        return {"loras": [str(item.get("name", "")) for item in listed(remote, _TEST_WITHIN)]}


def _tried(worker: KnownWorker, pack: PackState) -> dict[str, Any]:
    began = monotonic()
    with _connected(worker, pack) as remote:
        devices = [
            {"name": d.get("name", d.get("device", "?")), "budget": d.get("budget"), "loaded": d.get("loaded")}
            for d in remote.welcome.devices
        ]
        found = {
            "name": remote.welcome.name,
            "version": remote.welcome.package,
            "families": sorted(remote.welcome.adapters),
            "devices": devices,
            "ms": (monotonic() - began) * 1e3,
        }
        return visible_values(found)
