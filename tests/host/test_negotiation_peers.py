"""The choice of codec with peers that lack a codec, lie about themselves or are sent what they cannot carry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from mesh_codec import EntropyCodec, LosslessCodec
from mesh_codec.ans.nvcomp import ChunkCoder
from mesh_codec.base import CodecChoice, Encoded, Encoder, Quality
from mesh_codec.errors import CodecUnsupported
from mesh_codec.raw import RawCodec
from mesh_core import wire
from mesh_core.hookspecs import hookimpl
from mesh_core.plugins.registry import Plugins
from mesh_core.worker.server import Worker
from tests.codec.emulated_ans import EmulatedAns
from tests.support.negotiating import (
    SLOW,
    Brings,
    Deflate,
    over,
    plugins_with,
    run,
    shaped,
    state,
    used,
)


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


@pytest.mark.parametrize("codec", ["lossless", "entropy"])
@pytest.mark.parametrize("both", [True, False])
def test_a_coder_of_the_gpu_is_used_where_both_ends_have_it(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch, codec: str, both: bool
) -> None:
    def end(works: bool) -> Plugins:
        coder = EmulatedAns(works=works)
        return plugins_with(Brings(RawCodec(), LosslessCodec(coder), EntropyCodec(coder)), standard=False)

    plugins, made = end(True), []
    (worker,) = start(plugins)
    monkeypatch.setattr(worker.worker, "plugins", end(both))
    encode = ChunkCoder.compress
    monkeypatch.setattr(ChunkCoder, "compress", lambda self, data: (made.append(len(data)), encode(self, data))[1])
    quality: Quality = "lossless" if codec == "lossless" else "transparent"
    with over(tmp_path, [worker], plugins, quality=quality, codec=codec, dtype=torch.bfloat16) as session:
        tensor = state().bfloat16()
        made.clear()
        for _ in range(2):
            error = (run(session, tensor).float() - tensor.float()).abs().max()
            assert error == 0 if codec == "lossless" else error < 0.2
    # There and back, twice.
    assert made.count(tensor.numel()) == (4 if both else 0)


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
    monkeypatch.setattr(workers[0].worker.speeds, "plain", lambda: LIES[name]["speeds"])
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
    send = workers[0].worker.replies.send

    def lying(route: bytes, message: wire.Message, buffers: Any = ()) -> None:
        if isinstance(message, wire.Welcome):
            message = replace(message, codecs=dict.fromkeys(message.codecs, CAPABILITIES[name]))
        send(route, message, buffers)

    monkeypatch.setattr(workers[0].worker.replies, "send", lying)
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
