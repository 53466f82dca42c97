"""What the mesh itself costs per step: two workers on loopback whose blocks do nothing but copy.

The state goes host -> worker -> worker -> host, over three links.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

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
from mesh_core.model.numerics import Numerics
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import Conditioning
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.transport.base import Address
from mesh_core.transport.keys import KeyStore

WORKERS = 2
LINKS = WORKERS + 1
WARM_UP = 3
"""Steps that do not count."""

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
    mesh_mb_s: float


def measure(shapes: Sequence[tuple[int, ...]], steps: int, *, encrypted: bool) -> Iterator[Measured]:
    """Start everything, and for each shape run ``steps`` steps after some to warm up.

    Raises:
        TransportError: a process did not start.
    """
    with TemporaryDirectory() as folder, loopback_session(Path(folder), encrypted=encrypted) as session:
        for shape in shapes:
            state = state_of(shape)
            taken = list(run(session, state, WARM_UP + steps))
            yield summary(state.nbytes, encrypted, taken[WARM_UP:])


def state_of(shape: Sequence[int]) -> Tensor:
    """A bfloat16 state of noise, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def run(session: Session, state: Tensor, steps: int) -> Iterator[StepStats]:
    """Runs one step after the other; whoever iterates may do something else between two.

    Raises:
        TransportError: the state came back as another one.
    """
    for _ in range(steps):
        out = session.run({"hidden_states": state}, Conditioning())
        yield session.stats.steps[-1]
    if not torch.equal(out["hidden_states"], state):
        raise TransportError("The state did not come back as it was sent.", hint="mesh doctor")


def uncoded_ms(step: StepStats) -> float:
    """What is left of a step without compute and codec."""
    return step.total_ms - _compute_ms(step) - _codec_ms(step)


def summary(nbytes: int, encrypted: bool, taken: Sequence[StepStats]) -> Measured:
    """The medians of some steps with a state of ``nbytes``."""
    overhead = sorted(s.overhead_ms for s in taken)
    wire = median(s.wire_ms for s in taken)
    return Measured(
        state_bytes=nbytes,
        encrypted=encrypted,
        steps=len(taken),
        total_ms=median(s.total_ms for s in taken),
        compute_ms=median(map(_compute_ms, taken)),
        codec_ms=median(map(_codec_ms, taken)),
        wire_ms=wire,
        overhead_ms=median(overhead),
        overhead_high_ms=overhead[int(len(overhead) * 0.9)],
        mesh_mb_s=nbytes * LINKS / 1e3 / wire,
    )


def _compute_ms(step: StepStats) -> float:
    return sum(h.compute_ms for h in step.hops)


def _codec_ms(step: StepStats) -> float:
    return step.encode_ms + step.decode_ms + sum(h.encode_ms + h.decode_ms for h in step.hops)


@contextmanager
def loopback_session(folder: Path, *, encrypted: bool) -> Iterator[Session]:
    """A session over new workers, one block each; ``folder`` holds their keys and the model."""
    home, model = folder / "home", folder / "through.safetensors"
    save_file(ThroughModel(WORKERS).state_dict(), model)
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
        options = SessionOptions(Numerics(torch.float32), torch.device("cpu"), "lossless", Settings())
        yield stack.enter_context(open_session(addresses, model, ThroughModel(WORKERS), options, plugins()))


@contextmanager
def open_session(
    addresses: Sequence[Address], path: Path, model: ThroughModel, options: SessionOptions, installed: Plugins
) -> Iterator[Session]:
    """A session of ``model``, which lies at ``path``, over one worker per block; closed in the end.

    Raises:
        MeshError: it could not be opened.
    """
    spec = recognise(read_header(path), installed).spec
    identity = ModelIdentity(spec, fingerprint.structure(spec), fingerprint.of_model(spec, model))
    hops = [(Remote(a, installed, options.settings), BlockSpan(i, i + 1)) for i, a in enumerate(addresses)]
    session = Session(identity, hops, options, installed)
    try:
        session.open()
        yield session
    finally:
        session.close()
