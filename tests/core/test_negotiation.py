"""The choice of codec in a running session: on a link that changes, against plugins, and with peers that lie."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint
from itertools import pairwise
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mesh_codec.base import Codec, CodecChoice, Decoder, Encoded, Encoder, Estimate, Limits, Quality
from mesh_codec.errors import CodecUnsupported
from mesh_codec.raw import RawCodec
from mesh_core import fingerprint, negotiation, wire
from mesh_core.adapter import Conditioning
from mesh_core.bench import processes
from mesh_core.bench.shaper import Shaper
from mesh_core.bench.through import ThroughModel
from mesh_core.checkpoint import read_header
from mesh_core.config import Settings
from mesh_core.errors import PlanError
from mesh_core.hookspecs import ENTRY_POINT_GROUP, hookimpl
from mesh_core.hops import Identity
from mesh_core.library import recognise
from mesh_core.plugins import Plugins
from mesh_core.remote import Remote
from mesh_core.session import Session, SessionOptions
from mesh_core.spans import BlockSpan
from mesh_core.transport.base import Address
from mesh_core.worker import Worker
from tests.support.workers import ThreadWorker, thread_workers, wait_until

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

    def decoder(self, settings: Mapping[str, Any], limits: Limits = Limits()) -> Decoder:  # noqa: B008
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
    made = processes.plugins() if standard else Plugins([through])
    for plugin in extra:
        name = type(plugin).__name__
        made._manager.register(plugin, name)
        made._reports[name] = replace(
            made._reports["core.transports"], name=name, distribution="mesh-test", provides=()
        )
    return made


@contextmanager
def over(
    folder: Path, workers: list[ThreadWorker], plugins: Plugins, *, address: str = "", **options: Any
) -> Iterator[Session]:
    """A session of a model that passes its state through, over ``workers``."""
    path, whole = folder / "through.safetensors", ThroughModel(len(workers))
    spec = recognise(read_header(path), plugins).spec
    identity = Identity(spec, fingerprint.structure(spec), fingerprint.of_model(spec, whole))
    places = [address, *(w.address for w in workers[1:])] if address else [w.address for w in workers]
    hops = [(Remote(Address(a), plugins, Settings()), BlockSpan(i, i + 1)) for i, a in enumerate(places)]
    session = Session(identity, hops, SessionOptions(torch.float32, torch.device("cpu"), **options), plugins)
    try:
        session.open()
        yield session
    finally:
        session.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[ThreadWorker]]]:
    with ExitStack() as stack:

        def begin(plugins: Plugins, n: int = 1, scheme: str = "mesh") -> list[ThreadWorker]:
            save_file(ThroughModel(n).state_dict(), tmp_path / "through.safetensors")
            return stack.enter_context(thread_workers(tmp_path, n, scheme, plugins=plugins))

        yield begin


@contextmanager
def shaped(worker: ThreadWorker) -> Iterator[tuple[Shaper, str]]:
    """A link to ``worker`` that can be slowed down, and the address behind it."""
    host, _, port = worker.address.removeprefix("mesh://").rpartition(":")
    with Shaper(host, int(port), WIDE_OPEN) as link:
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


def test_a_link_that_slows_down_changes_the_codec_and_not_the_result(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with(Brings(RawCodec(), Deflate()), standard=False)
    workers = start(plugins)
    with shaped(workers[0]) as (link, address), over(tmp_path, workers, plugins, address=address) as session:
        for step in range(3):
            assert torch.equal(run(session, state(seed=step), sequence=str(step % 2)), state(seed=step))
        assert used(session)[-1] == "raw"
        link.rate = SLOW
        for step in range(3, 9):
            assert torch.equal(run(session, state(seed=step), sequence=str(step % 2)), state(seed=step))
        assert used(session)[-1] == "deflate"
        slow, last = session.stats.steps[3], session.stats.steps[-1]
        assert last.total_ms < slow.total_ms
        assert last.reason.startswith("link measured ") and "deflate" in last.reason
        assert [s.resent for s in session.stats.steps] == [0] * 9 and session.stats.reconnects == 0
        assert session.stats.table().count(last.reason) == 1


def test_a_slow_link_is_coded_from_the_first_step(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with()
    workers = start(plugins)
    with shaped(workers[0]) as (link, address):
        link.rate = SLOW
        wait_until(lambda: "entropy" in _surveyed(workers[0]), 30, "the survey of codecs")
        with over(tmp_path, workers, plugins, address=address, quality="fast") as session:
            assert (run(session, state()) - state()).abs().max() < 0.5
            (step,) = session.stats.steps
            assert step.codec != "raw" and step.hops[0].in_coded < 0.9 * step.hops[0].in_raw


def test_a_chain_measures_its_own_links(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with()
    workers = start(plugins, 3)
    with over(tmp_path, workers, plugins) as session:
        remotes = session.remotes
        known = [session._codecs._links[id(a), id(b)] for a, b in pairwise(remotes)]
        assert len(known) == 2 and all(link.bandwidth > 1e6 for link in known)
        assert torch.equal(run(session, state()), state())
        assert session.stats.steps[0].reason.count("measured") >= 1


class Stubborn:
    """Chooses whatever the link; of the arguments it takes those that it needs."""

    def __init__(self, codec: str) -> None:
        self.codec = codec

    @hookimpl
    def mesh_choose_codec(self, role: str, quality: Quality) -> CodecChoice | None:
        settings = {"level": 6} if self.codec == "deflate" else {}
        return CodecChoice(self.codec, settings, "as the plugin says") if role == "hidden" else None


def test_a_plugin_that_chooses_wins(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with(Brings(Deflate()), Stubborn("deflate"))
    workers = start(plugins, scheme="inproc")
    with over(tmp_path, workers, plugins) as session:
        for _ in range(3):
            assert torch.equal(run(session, state()), state())
        assert {(s.codec, s.reason) for s in session.stats.steps} == {("deflate", "as the plugin says")}


def test_a_plugin_may_change_its_mind_at_every_step(tmp_path: Path, start: Any) -> None:
    stubborn = Stubborn("deflate")
    plugins = plugins_with(Brings(Deflate()), stubborn)
    workers = start(plugins, 2)
    with over(tmp_path, workers, plugins) as session:
        for step in range(4):
            stubborn.codec = ("raw", "deflate")[step % 2]
            assert torch.equal(run(session, state(seed=step)), state(seed=step))
        assert used(session) == ["raw", "deflate"] * 2
        assert session.stats.reconnects == 0 and not any(s.resent for s in session.stats.steps)


class Counting(Stubborn):
    """Counts how often it is asked."""

    asked = 0

    @hookimpl
    def mesh_choose_codec(self, role: str, quality: Quality) -> CodecChoice | None:
        self.asked += 1
        return super().mesh_choose_codec(role, quality)


def test_a_choice_that_has_settled_is_looked_at_once_in_a_while(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting("deflate")
    plugins = plugins_with(Brings(Deflate()), counting)
    monkeypatch.setattr(Deflate, "takes", 0.0)
    monkeypatch.setattr(negotiation, "_LOOK_AGAIN", 1e9)
    (worker,) = start(plugins, scheme="inproc")
    # The model computes in float32; what its state takes in bytes says nothing of how many elements it has.
    small, large = state(1024).bfloat16(), state(2048).bfloat16()
    with over(tmp_path, [worker], plugins) as session:
        for _ in range(negotiation._LEARNING):
            assert torch.equal(run(session, small), small)
        settled = counting.asked
        for _ in range(5):
            run(session, small)
        assert counting.asked == settled
        run(session, large)
        other_size = counting.asked
        assert other_size > settled
        for tensor in (small, large, small, large):
            assert torch.equal(run(session, tensor, str(tensor.numel())), tensor)
        assert counting.asked == other_size
        monkeypatch.setattr(negotiation, "_LOOK_AGAIN", 0.0)
        counting.codec = "raw"
        assert torch.equal(run(session, small), small)
        assert used(session)[-2:] == ["deflate", "raw"]


def test_a_link_that_slows_down_changes_a_choice_that_has_settled(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with(Brings(RawCodec(), Deflate()), standard=False)
    workers = start(plugins)
    with shaped(workers[0]) as (link, address), over(tmp_path, workers, plugins, address=address) as session:
        for step in range(negotiation._LEARNING + 4):
            run(session, state(seed=step))
        assert set(used(session)) == {"raw"}
        link.rate = SLOW
        for step in range(8):
            assert torch.equal(run(session, state(seed=step)), state(seed=step))
        assert used(session)[-1] == "deflate"


def test_a_codec_by_name_is_used_whatever_the_link(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with(Brings(Deflate()))
    workers = start(plugins, scheme="inproc")
    with over(tmp_path, workers, plugins, codec="deflate") as session:
        assert torch.equal(run(session, state()), state())
        assert used(session) == ["deflate"]
    with pytest.raises(PlanError, match="'entropy'"), over(tmp_path, workers, plugins, codec="entropy"):
        pass


def test_a_peer_without_the_codec_gets_what_it_has(tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = plugins_with(Brings(Deflate()))
    (worker,) = start(plugins)
    monkeypatch.setattr(worker.worker, "plugins", plugins_with())
    with shaped(worker) as (link, address):
        link.rate = SLOW
        with over(tmp_path, [worker], plugins, address=address) as session:
            assert torch.equal(run(session, state()), state())
            # Each way has a codec of its own.
            assert set(used(session)[0].split("+")) <= plugins_with().codecs().keys()


LIES: dict[str, Any] = {
    "speeds are text": {"speeds": "fast"},
    "speeds of nothing": {"speeds": [None, 3, {}, {"codec": "entropy"}]},
    "negative": {"speeds": [{"codec": "entropy", "engine": "", "encode": [-1, -1], "decode": [0, -5e9]}]},
    "huge": {"speeds": [{"codec": "entropy", "engine": "", "encode": [0.0, 1e300], "decode": [0.0, (1 << 63) - 1]}]},
    "endless": {"speeds": [{"codec": "raw", "engine": "", "encode": [1e300, 1e-300], "decode": [1e300, 1]}]},
    "texts": {"speeds": [{"codec": "entropy", "engine": "", "encode": ["0", "1e9"], "decode": ["", ""]}]},
    "nested": {"speeds": [[[[]]]]},
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("quality", ["lossless", "balanced"])
def test_a_worker_that_lies_about_itself_harms_nothing(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch, name: str, quality: Quality
) -> None:
    plugins = plugins_with()
    workers = start(plugins, scheme="inproc")
    report = Worker._device_report
    monkeypatch.setattr(Worker, "_device_report", lambda self: report(self) | LIES[name])
    monkeypatch.setattr(workers[0].worker.hosting.speeds, "plain", lambda: LIES[name]["speeds"])
    with over(tmp_path, workers, plugins, quality=quality) as session:
        for _ in range(4):
            error = (run(session, state()) - state()).abs().max()
            assert error == 0 if quality == "lossless" else error < 0.5


CAPABILITIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "numbers": {"formats": -1, "engines": 1 << 62, "levels": 0.5},
    "texts": {"formats": "step-zstd-1", "levels": "1"},
    "nested": {"formats": [[["x"]]], "levels": {"1": None}},
    "many": {"formats": ["x"] * 4000, "levels": list(range(4000))},
}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_capabilities_that_make_no_sense_leave_the_codec_out_or_work(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plugins = plugins_with()
    workers = start(plugins, scheme="inproc")
    send = workers[0].worker._send

    def lying(route: bytes, message: wire.Message, buffers: Any = None) -> None:
        if isinstance(message, wire.Welcome):
            message = replace(message, codecs=dict.fromkeys(message.codecs, CAPABILITIES[name]))
        send(route, message, buffers)

    monkeypatch.setattr(workers[0].worker, "_send", lying)
    with over(tmp_path, workers, plugins, quality="fast") as session:
        assert (run(session, state()) - state()).abs().max() < 0.5


class NoFloats(RawCodec):
    """Promises much, and refuses what comes."""

    name = "no-floats"

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def encoder(self, settings: Mapping[str, Any]) -> Any:
        class Refusing(Encoder):
            def encode(self, tensor: Tensor) -> Encoded:
                raise CodecUnsupported("no floats")

        return Refusing()


def test_a_tensor_that_the_chosen_codec_cannot_carry_crosses_uncoded(
    tmp_path: Path, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Chooses:
        @hookimpl
        def mesh_choose_codec(self, role: str, codecs: Any) -> CodecChoice | None:
            found = next((c for c in codecs if c.name == "no-floats"), None)
            return CodecChoice("no-floats", {}, "promising") if found else None

    plugins = plugins_with(Brings(NoFloats()), Chooses())
    workers = start(plugins, scheme="inproc")
    with over(tmp_path, workers, plugins) as session:
        for _ in range(2):
            assert torch.equal(run(session, state()), state())
        assert used(session) == ["raw", "raw"] and session.stats.steps[0].resent == 1
    assert "uncoded from here on: no floats" in caplog.text


def test_opening_tells_how_fast_the_worker_codes(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with()
    workers = start(plugins, scheme="inproc")
    wait_until(lambda: _surveyed(workers[0]) >= {"entropy"}, 20, "the survey of codecs")
    with over(tmp_path, workers, plugins) as session:
        assert {codec for codec, _ in session._codecs._end(session.remotes[0]).told} >= {"entropy"}


def _surveyed(worker: ThreadWorker) -> set[str]:
    return {entry["codec"] for entry in worker.worker.speeds.plain()}
