"""Sessions over links that can be slowed down, with codecs and plugins of the tests. Must not know what is chosen."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shaper import Shaper
from mesh_codec.base import Codec, DecodeLimits, Decoder, Encoded, Encoder, Estimate, Quality
from mesh_codec.errors import CodecUnsupported
from mesh_codec.raw import RawCodec
from mesh_core.bench import processes
from mesh_core.bench.through import ThroughModel
from mesh_core.builtin import builtin_plugins
from mesh_core.hookspecs import ENTRY_POINT_GROUP, hookimpl
from mesh_core.host.options import ModelIdentity, SessionOptions
from mesh_core.host.remote import Remote
from mesh_core.host.session import Session
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import recognise
from mesh_core.model.numerics import Numerics
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import Conditioning
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.transport.base import Address
from mesh_core.transport.memory_link import SWITCH
from tests.support.workers import ThreadWorker, thread_workers

WIDE_OPEN, SLOW = 4e9, 1.2e6


class Deflate(Codec):
    """Exact, and small where the data is: the second way to be lossless. Takes its time, whatever else the machine
    does: a codec that pays on slow links alone."""

    name = "deflate"
    takes = 0.06

    def capabilities(self) -> dict[str, Any]:
        return {"levels": [1, 6]}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        if 1 not in peer.get("levels", ()):
            raise CodecUnsupported("no common level")
        return {"level": 1}

    def estimate(self, settings: Mapping[str, Any], dtype: torch.dtype) -> Estimate:
        return Estimate(bits=6.0)

    def encoder(self, settings: Mapping[str, Any]) -> Encoder:
        class Deflating(Encoder):
            def encode(self, tensor: Tensor) -> Encoded:
                sleep(Deflate.takes)
                coded = RawCodec().encoder({}).encode(tensor)
                return Encoded(coded.header, [zlib.compress(b, settings["level"]) for b in coded.buffers])

        return Deflating()

    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> Decoder:  # noqa: B008
        class Inflating(Decoder):
            def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
                sleep(Deflate.takes)
                plain = [zlib.decompress(b) for b in encoded.buffers]
                return RawCodec().decoder({}, limits).decode(Encoded(encoded.header, plain), device)

        return Inflating()


class Brings:
    """A plugin with codecs."""

    def __init__(self, *codecs: Codec) -> None:
        self.codecs = codecs

    @hookimpl
    def mesh_register_codecs(self, register: Callable[[Codec], None]) -> None:
        for codec in self.codecs:
            register(codec)


def plugins_with(*extra: object, standard: bool = True) -> Plugins:
    """The benchmark's plugins and ``extra`` ones; without this project's codecs where they are not ``standard``."""
    through = EntryPoint("through", "mesh_core.bench.through", ENTRY_POINT_GROUP)
    made = processes.plugins() if standard else Plugins(builtin_plugins(), [through])
    for plugin in extra:
        name = type(plugin).__name__
        made._manager.register(plugin, name)
        made._reports[name] = replace(
            made._reports["core.transports"], name=name, distribution="mesh-test", provides=()
        )
    return made


@contextmanager
def over(
    folder: Path, workers: list[ThreadWorker], plugins: Plugins, *, address: str = "",
    dtype: torch.dtype = torch.float32, **options: Any,
) -> Iterator[Session]:  # fmt: skip
    """A session of a model that passes its state through, over ``workers``."""
    path, whole = folder / "through.safetensors", ThroughModel(len(workers))
    spec = recognise(read_header(path), plugins).spec
    identity = ModelIdentity(spec, fingerprint.structure(spec), fingerprint.of_model(spec, whole))
    places = [address, *(w.address for w in workers[1:])] if address else [w.address for w in workers]
    hops = [(Remote(Address(a), plugins, Settings()), BlockSpan(i, i + 1)) for i, a in enumerate(places)]
    session = Session(identity, hops, SessionOptions(Numerics(dtype), torch.device("cpu"), **options), plugins)
    try:
        session.open()
        yield session
    finally:
        session.close()


@contextmanager
def starting(folder: Path) -> Iterator[Callable[..., list[ThreadWorker]]]:
    """Starts workers of that model, which end with the context."""
    with ExitStack() as stack:

        def begin(plugins: Plugins, n: int = 1, scheme: str = "mesh") -> list[ThreadWorker]:
            save_file(ThroughModel(n).state_dict(), folder / "through.safetensors")
            return stack.enter_context(thread_workers(folder, n, scheme, plugins=plugins))

        yield begin


@contextmanager
def shaped(worker: ThreadWorker) -> Iterator[tuple[Shaper, str]]:
    """A link to ``worker`` that can be slowed down, and the address behind it."""
    host, _, port = worker.address.removeprefix("mesh://").rpartition(":")
    # What this process shares with the worker would not cross the link.
    with Shaper(host, int(port), WIDE_OPEN) as link, pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0")
        yield link, f"mesh://127.0.0.1:{link.port}"


def state(elements: int = 128 * 1024, seed: int = 0) -> Tensor:
    """Of few bits: the first channels vary, the others are constant."""
    tensor = torch.zeros(1, elements // 1024, 1024)
    tensor[..., :128] = torch.randn(1, elements // 1024, 128, generator=torch.Generator().manual_seed(seed))
    return tensor


def run(session: Session, tensor: Tensor, sequence: str = "") -> Tensor:
    return session.run({"hidden_states": tensor}, Conditioning(), sequence=sequence)["hidden_states"]


def used(session: Session) -> list[str]:
    return [step.codec for step in session.stats.steps]
