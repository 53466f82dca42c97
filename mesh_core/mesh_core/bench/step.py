"""What the mesh itself costs per step: two workers on loopback, next to bare ZeroMQ with the same bytes.

The state goes host -> worker -> worker -> host, over three links. Steps of the mesh and turns of the bare ring
alternate, so that both meet the same machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mesh_core.bench.processes import Child, plugins
from mesh_core.bench.through import ThroughModel
from mesh_core.crossing.stats import StepStats
from mesh_core.errors import TransportError
from mesh_core.host.options import ModelIdentity, SessionOptions
from mesh_core.host.remote import Remote
from mesh_core.host.session import Session
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import recognise
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import Conditioning
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.transport.bare import BareRing, new_keys
from mesh_core.transport.base import Address
from mesh_core.transport.keys import KeyStore

WORKERS = 2
LINKS = WORKERS + 1
WARM_UP = 3


SHAPES = ((1, 128, 4096), (1, 4096, 4096), (1, 4608, 4096))
"""Of bfloat16 states: 1 MB; 33.6 MB, the hidden state of a 1024x1024 picture; 37.7 MB, with 512 text tokens."""


@dataclass(frozen=True)
class Measured:
    """Medians over the steps of one case. Milliseconds; MB/s are 10^6 bytes per second over all links.

    Attributes:
        total_ms: a step as the host program sees it.
        compute_ms, codec_ms: at all ends together.
        wire_ms: from sending to arriving, the workers' own time taken off.
        overhead_ms: total less compute, codec and wire.
        overhead_high_ms: what nine of ten steps stay under.
        bare_ms: a turn of the bare ring.
        beyond_bare_ms: a step's total less compute and codec, less the turn of the bare ring that followed it.
    """

    state_bytes: int
    encrypted: bool
    steps: int
    total_ms: float
    compute_ms: float
    codec_ms: float
    wire_ms: float
    overhead_ms: float
    overhead_high_ms: float
    bare_ms: float
    beyond_bare_ms: float
    mesh_mb_s: float
    bare_mb_s: float


def measure(shapes: Sequence[tuple[int, ...]], steps: int, *, encrypted: bool) -> Iterator[Measured]:
    """Start everything, and for each shape run ``steps`` steps after some to warm up.

    Raises:
        TransportError: a process did not start.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        session = stack.enter_context(_session(folder, encrypted))
        turn = stack.enter_context(_ring(folder, encrypted))
        for shape in shapes:
            state = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
            ours, bare = _alternate(state, WARM_UP + steps, session, turn)
            yield _summary(state.nbytes, encrypted, ours[WARM_UP:], bare[WARM_UP:])


def _alternate(
    state: Tensor, steps: int, session: Session, turn: Callable[[memoryview], memoryview]
) -> tuple[list[StepStats], list[float]]:
    """Steps of the mesh, and milliseconds of the bare turns after each."""
    payload = state.view(torch.uint8).numpy().data.cast("B")
    bare: list[float] = []
    session.stats.clear()
    for _ in range(steps):
        out = session.run({"hidden_states": state}, Conditioning())
        began = perf_counter()
        back = turn(payload)
        bare.append((perf_counter() - began) * 1e3)
        del back
    if not torch.equal(out["hidden_states"], state):
        raise TransportError("The state did not come back as it was sent.", hint="mesh doctor")
    return list(session.stats.steps), bare


def _summary(nbytes: int, encrypted: bool, ours: list[StepStats], bare: list[float]) -> Measured:
    compute = [sum(h.compute_ms for h in s.hops) for s in ours]
    codec = [s.encode_ms + s.decode_ms + sum(h.encode_ms + h.decode_ms for h in s.hops) for s in ours]
    rest = [s.total_ms - c - e for s, c, e in zip(ours, compute, codec, strict=True)]
    overhead = sorted(s.overhead_ms for s in ours)
    wire, loop = median(s.wire_ms for s in ours), median(bare)
    crossed = nbytes * LINKS / 1e3
    return Measured(
        state_bytes=nbytes,
        encrypted=encrypted,
        steps=len(ours),
        total_ms=median(s.total_ms for s in ours),
        compute_ms=median(compute),
        codec_ms=median(codec),
        wire_ms=wire,
        overhead_ms=median(overhead),
        overhead_high_ms=overhead[int(len(overhead) * 0.9)],
        bare_ms=loop,
        beyond_bare_ms=median(r - b for r, b in zip(rest, bare, strict=True)),
        mesh_mb_s=crossed / wire,
        bare_mb_s=crossed / loop,
    )


@contextmanager
def _session(folder: Path, encrypted: bool) -> Iterator[Session]:
    """A session over new workers, which do all the blocks."""
    home, model = folder / "home", folder / "through.safetensors"
    whole = ThroughModel(WORKERS)
    save_file(whole.state_dict(), model)
    installed = plugins()
    store = KeyStore(home / "config")
    store.authorise(KeyStore().identity().client.public, "benchmark")
    with ExitStack() as stack:
        told = {"model": str(model), "insecure": not encrypted}
        children = [
            stack.enter_context(Child("mesh_core.bench.worker", {**told, "name": f"worker {i}"}, home))
            for i in range(WORKERS)
        ]
        key = store.identity().server.public if encrypted else ""
        addresses = [Address(child.hear()["address"], key) for child in children]
        session = _opened(addresses, model, whole, installed)
        stack.callback(session.close)
        yield session


def _opened(addresses: list[Address], model: Path, whole: nn.Module, installed: Plugins) -> Session:
    settings = Settings()
    checkpoint = recognise(read_header(model), installed)
    spec = checkpoint.spec
    identity = ModelIdentity(spec, fingerprint.structure(spec), fingerprint.of_model(spec, whole))
    hops = [(Remote(a, installed, settings), BlockSpan(i, i + 1)) for i, a in enumerate(addresses)]
    options = SessionOptions(torch.float32, torch.device("cpu"), "lossless", settings)
    session = Session(identity, hops, options, installed)
    session.open()
    return session


@contextmanager
def _ring(folder: Path, encrypted: bool) -> Iterator[Callable[[memoryview], memoryview]]:
    keys = new_keys() if encrypted else None
    with ExitStack() as stack:
        told = {"keys": keys}
        nodes = [stack.enter_context(Child("mesh_core.bench.bare_node", told, folder / "home")) for _ in range(WORKERS)]
        ports = [int(node.hear()["port"]) for node in nodes]
        for node, following in zip(nodes, [*ports[1:], None], strict=True):
            node.tell({"following": following})
        yield stack.enter_context(BareRing(ports, keys)).turn
