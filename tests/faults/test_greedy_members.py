"""One member that takes all it can of a worker, and an honest one beside it: exact steps, pings answered at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from secrets import token_bytes

import pytest
import torch
from blake3 import blake3

from mesh_codec.base import CodecChoice
from mesh_core import wire
from mesh_core.crossing.constants import digest
from mesh_core.crossing.streams import entry
from mesh_core.errors import MeshError, PeerLost, PlanDoesNotFit, WireMalformed
from mesh_core.host.remote import Remote
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.identity import identify
from mesh_core.system.config import Deadlines, WorkerSettings
from mesh_core.transport.base import Address
from tests.faults.conftest import IMPATIENT, Case
from tests.faults.honest import member, undisturbed
from tests.faults.processes import workers
from tests.support.splitting import checkpoint_at
from tests.support.workers import process_worker, wait_until

RAW = {"codec": "raw", "settings": {}}


def opening(case: Case, plugins: Plugins, **changes: object) -> wire.Open:
    """A proper request for all blocks but the first, with some fields changed."""
    checkpoint = checkpoint_at(case.path, plugins)
    identity, spec = identify(checkpoint), checkpoint.spec
    fields: dict[str, object] = {
        "session": token_bytes(16),
        "family": spec.family,
        "structure": identity.structure,
        "fingerprint": identity.fingerprint,
        "span": [1, spec.blocks],
        "dtype": "float32",
        "others": {},
        "arithmetic": {},
        "computed": None,
        "loras": [],
        "inputs": dict.fromkeys(spec.states[1], RAW),
        "outputs": dict.fromkeys(spec.states[-1], RAW),
        "next": None,
        "options": {},
    }
    return wire.Open(wire.next_id(), **{**fields, **changes})  # type: ignore[arg-type]


@contextmanager
def neighbour(plugins: Plugins, *, answers: bool) -> Iterator[dict[str, object]]:
    """A worker that answers every probe wrongly, or not at all; how the one before it is told of it."""
    listener = plugins.transport("mesh").listen("mesh://127.0.0.1:0")
    enough = threading.Event()

    def serve() -> None:
        while not enough.is_set():
            got = listener.receive(0.05)
            if got is not None and answers:
                peer, frames = got
                wrong = wire.Probed(wire.unpack(frames)[0].id + 1)
                listener.send(peer.route, wire.pack(wrong, [b""]))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        key = plugins.transport("mesh").resolve(Address(listener.address)).server_key
        yield {"address": listener.address, "server_key": key, "session": b"n" * 16}
    finally:
        enough.set()
        thread.join()
        listener.close()


@pytest.mark.parametrize(("answers", "error"), [(True, WireMalformed), (False, PeerLost)])
def test_neighbours_that_answer_probes_wrongly_or_never(
    quick: Case, plugins: Plugins, tmp_path: Path, answers: bool, error: type[MeshError]
) -> None:
    settings = replace(IMPATIENT, deadlines=Deadlines(connect=1.5))
    with (
        workers(quick.path.parent, 1, settings) as (worker,),
        member(worker.address, tmp_path) as hostile,
        neighbour(plugins, answers=answers) as following,
    ):
        asked = [opening(quick, plugins, next=following, options={"measure": True}) for _ in range(8)]
        for message in asked[1:]:
            hostile.tell(message)
        with undisturbed(quick, worker.address, plugins), pytest.raises(error, match="next worker"):
            hostile.ask(asked[0], wire.Opened, timeout=20)


def test_a_worker_stops_when_asked_though_a_thread_of_it_hangs(quick: Case, plugins: Plugins) -> None:
    hanging = (
        "import threading; from mesh_core.cli import main; from mesh_core.worker import opening, server; "
        "opening.SessionOpener.open = lambda *_: threading.Event().wait(); server._ENDS_WITHIN = 0.5; main()"
    )
    with process_worker(quick.path.parent, "--device", "cpu", program=("-c", hanging)) as worker:
        remote = Remote(Address(worker.address), plugins, IMPATIENT)
        remote.connect()
        for _ in range(3):
            remote.tell(opening(quick, plugins))
        assert remote.ask(wire.Ping(wire.next_id(), b""), wire.Pong, timeout=5)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(15) == 0
        wait_until(lambda: any("hangs" in line for line in worker.log), what="saying why")
        remote.close()


def constants(session: bytes, content: bytes, shapes: list[list[int]]) -> wire.Constants:
    """Announces constants of these shapes and this content."""
    entries = [
        {
            "n": "constant",
            "c": "raw",
            "s": {},
            "h": {"dtype": "uint8", "shape": shape},
            "k": int(bool(content)),
            "hash": blake3(f'["uint8", {shape}]'.encode() + content).hexdigest(),
        }
        for shape in shapes
    ]
    return wire.Constants(wire.next_id(), session, entries)


@pytest.mark.parametrize("kind", ["empty", "large"])
def test_constants_without_end(quick: Case, plugins: Plugins, tmp_path: Path, kind: str) -> None:
    with (
        workers(quick.path.parent, 1, IMPATIENT) as (worker,),
        member(worker.address, tmp_path) as hostile,
    ):
        opened = opening(quick, plugins)
        hostile.ask(opened, wire.Opened, timeout=20)
        before = worker.resident()
        with undisturbed(quick, worker.address, plugins):
            for number in range(20):
                if kind == "empty":
                    content, shapes = b"", [[0, 600 * number + i] for i in range(600)]
                else:
                    content = token_bytes(16) * (4 << 20)
                    shapes = [[len(content)]]
                message = constants(opened.session, content, shapes)
                hostile.ask(message, wire.Ok, buffers=[content] if content else [], timeout=30)
        assert worker.resident() - before < (200 if kind == "empty" else 1300) << 20


def test_a_step_of_a_few_kilobytes_that_would_fill_the_memory(quick: Case, plugins: Plugins, tmp_path: Path) -> None:
    settings = replace(IMPATIENT, worker=WorkerSettings(step_memory=256 << 20))
    lossless = CodecChoice("lossless")
    coded = plugins.codec("lossless").encoder({}).encode(torch.zeros(1 << 14, 7 + 16, 64))
    temb = plugins.codec("raw").encoder({}).encode(torch.zeros(1, 64))
    assert coded.nbytes < 64 << 10
    with (
        workers(quick.path.parent, 1, settings) as (worker,),
        member(worker.address, tmp_path) as hostile,
    ):
        opened = opening(quick, plugins)
        opened.inputs["hidden_states"] = {"codec": "lossless", "settings": {}}
        hostile.ask(opened, wire.Opened, timeout=20)
        ids = torch.zeros(16, 4, dtype=torch.int64), torch.zeros(7, 4, dtype=torch.int64)
        named = {}
        for name, tensor in zip(("img_ids", "txt_ids"), ids, strict=True):
            raw = plugins.codec("raw").encoder({}).encode(tensor)
            named[name] = digest(raw)
            item = {"hash": named[name], **entry("constant", CodecChoice("raw"), raw)}
            hostile.ask(
                wire.Constants(wire.next_id(), opened.session, [item]), wire.Ok, buffers=raw.buffers, timeout=20
            )
        tensors = [entry("hidden_states", lossless, coded), entry("temb", CodecChoice("raw"), temb)]
        before = worker.resident()
        with undisturbed(quick, worker.address, plugins):
            for step in range(1, 9):
                message = wire.Step(wire.next_id(), opened.session, step, 0, 0, "", named, {}, tensors, [], 60_000)
                with pytest.raises(PlanDoesNotFit, match="tokens needs") as caught:
                    hostile.ask(message, wire.Result, buffers=[*coded.buffers, *temb.buffers], timeout=20)
                assert "smaller picture" in caught.value.hint
        assert worker.resident() - before < 64 << 20, "the state alone has 96 MB"
