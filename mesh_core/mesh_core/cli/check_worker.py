"""What ``mesh doctor`` looks at on the way to one worker: from its name to the weights that it holds.

Each check builds on the one before; the first that fails is the last.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh_core import __version__
from mesh_core.cli.findings import Finding, failed
from mesh_core.errors import MeshError
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings, in_bytes
from mesh_core.transport.address import SCHEME, Place, parse_place
from mesh_core.transport.base import Address
from mesh_core.transport.reach import WAY

if TYPE_CHECKING:
    from mesh_core.host.remote import Remote

_SLOW = 10e6
"""Bytes per second under which a hidden state of 33 MB takes longer than most steps compute."""


def check_worker(text: str, model: Path | None, plugins: Plugins, settings: Settings) -> Iterator[Finding]:
    """All checks of the worker at the address ``text``; with ``model``, whether it has the same weights."""
    from mesh_core.host.remote import Remote

    remote: Remote | None = None
    name = "address"
    try:
        if Address(text).scheme == SCHEME:
            place = parse_place(text)
            name = "name"
            yield _resolved(text, place)
            name = "port"
            yield _reached(text, place, settings.deadlines.connect)
        name = "handshake"
        remote = Remote(Address(text), plugins, settings)
        remote.connect()
        secret = "encrypted" if remote.address.server_key else "NOT encrypted"
        yield Finding(text, "handshake", "ok", f"{remote.welcome.name} answers, {secret}, wire {remote.welcome.wire}")
        yield from _versions(text, remote.welcome.package, remote.welcome.plugins, plugins)
        yield from _abilities(text, remote, plugins)
        name = "link"
        yield _link(text, remote)
        if model is not None:
            name = "weights"
            yield _weights(text, remote, model, plugins, settings)
    except MeshError as error:
        yield failed(text, name, error)
    except _Stop as stop:
        yield stop.check
    finally:
        if remote is not None:
            remote.close()


class _Stop(Exception):
    """A failed check, with a better hint than an error has."""

    def __init__(self, check: Finding) -> None:
        self.check = check


def _resolved(text: str, place: Place) -> Finding:
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        detail = f"{place.host} does not resolve: {error}"
        raise _Stop(Finding(text, "name", "FAIL", detail, "the worker's IP address in place of its name")) from error
    return Finding(text, "name", "ok", ", ".join(sorted({str(entry[4][0]) for entry in found})))


def _reached(text: str, place: Place, timeout: float) -> Finding:
    try:
        socket.create_connection((place.host, place.port), timeout=timeout).close()
    except ConnectionRefusedError as error:
        hint = f"on that machine: mesh serve --port {place.port}, with --bind 0.0.0.0 if it is not this one"
        raise _Stop(Finding(text, "port", "FAIL", f"nobody listens at port {place.port}", hint)) from error
    except OSError as error:
        detail = f"port {place.port} does not answer within {timeout:g} s: {error}"
        raise _Stop(Finding(text, "port", "FAIL", detail, WAY)) from error
    return Finding(text, "port", "ok", f"{place.port} is open")


def _versions(text: str, package: str, theirs: Mapping[str, str], plugins: Plugins) -> Iterator[Finding]:
    mine = plugins.versions()
    other = [
        f"{n} {theirs[n]} there, {mine[n]} here" for n in sorted(mine.keys() & theirs.keys()) if theirs[n] != mine[n]
    ]
    if package != __version__ or other:
        detail = "; ".join(other) or f"comfyui-mesh {package} there, {__version__} here"
        yield Finding(text, "versions", "warn", detail, "pip install --upgrade on the older side")
    else:
        yield Finding(text, "versions", "ok", f"the same here and there: comfyui-mesh {package}")


def _abilities(text: str, remote: Remote, plugins: Plugins) -> Iterator[Finding]:
    welcome = remote.welcome
    lacking = sorted(plugins.adapters().keys() - welcome.adapters.keys())
    runs = ", ".join(f"{f} {v}" for f, v in sorted(welcome.adapters.items())) or "no model family"
    if lacking:
        hint = (
            f"on {welcome.name}: pip install {' '.join(f'comfyui-mesh-{family}' for family in lacking)}; mesh plugins"
        )
        yield Finding(text, "adapters", "warn", f"{runs}; it lacks {', '.join(lacking)}", hint)
    else:
        yield Finding(text, "adapters", "ok", runs)
    shared = sorted(plugins.codecs().keys() & welcome.codecs.keys())
    if "raw" in shared:
        yield Finding(text, "codecs", "ok", f"in common: {', '.join(shared)}")
    else:
        hint = "the same comfyui-mesh-codec on both machines"
        raise _Stop(Finding(text, "codecs", "FAIL", f"in common: {', '.join(shared) or 'none'}, not raw", hint))
    for device in welcome.devices:
        yield Finding(text, "device", "ok", _device(device))


def _device(report: Mapping[str, Any]) -> str:
    def gb(name: str) -> str:
        value = report.get(name)
        return in_bytes(value) if isinstance(value, int) else "unknown"

    where, what = report.get("device", "?"), report.get("name", "?")
    label = f"{where}" if where == what else f"{where}, {what}"
    return f"{label}: {gb('budget')} for weights, {gb('loaded')} loaded, {report.get('sessions', '?')} sessions"


def _link(text: str, remote: Remote) -> Finding:
    from mesh_core.host.remote import measure

    there, back = measure(remote)
    rates = f"{there.bandwidth / 1e6:.0f} MB/s to there, {back.bandwidth / 1e6:.0f} MB/s from there"
    detail = f"{rates}, {there.latency * 1e3:.1f} ms there and back"
    if min(there.bandwidth, back.bandwidth) < _SLOW:
        return Finding(text, "link", "warn", detail, "a cable in place of wireless, or --quality balanced")
    return Finding(text, "link", "ok", detail)


def _weights(text: str, remote: Remote, model: Path, plugins: Plugins, settings: Settings) -> Finding:
    """Has the worker open the model's smallest block, which it does only if every weight is the same."""
    import torch

    from mesh_core.host.options import SessionOptions
    from mesh_core.host.session import Session
    from mesh_core.model.checkpoint import read_header
    from mesh_core.model.library import recognise
    from mesh_core.model.numerics import usual_numerics
    from mesh_core.model.sizes import span_bytes
    from mesh_core.model.spans import BlockSpan
    from mesh_core.programs.identity import file_dtype, identify

    checkpoint = recognise(read_header(model), plugins)
    spec = checkpoint.spec
    block = min((BlockSpan(i, i + 1) for i in range(spec.blocks)), key=lambda span: span_bytes(spec, span))
    device = torch.device("cpu")
    numerics = usual_numerics(spec, file_dtype(checkpoint), device, plugins.weight_formats())
    options = SessionOptions(numerics, device, settings=settings)
    identity = identify(checkpoint)
    session = Session(identity, [(remote, block)], options, plugins)
    session.open()
    session.close()
    found = f"{spec.family} {spec.variant}, fingerprint {identity.fingerprint[:12]}"
    return Finding(text, "weights", "ok", f"the same on {platform.node() or 'this machine'} and there: {found}")
