"""``mesh bench step`` beside bare ZeroMQ: what the mesh adds to the same bytes on the same way.

    python -m benchmarks.step --label "2-core virtual machine" --save benchmarks/results

Between the steps the same bytes take the same way through as many processes over bare pyzmq sockets. Steps and turns of
the bare ring alternate, so that both meet the same machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.bare import BareRing, new_keys
from mesh_core.bench.processes import Child
from mesh_core.bench.report import save
from mesh_core.bench.step import (
    LINKS,
    SHAPES,
    WARM_UP,
    WORKERS,
    Measured,
    loopback_session,
    run,
    state_of,
    summary,
    uncoded_ms,
)
from mesh_core.bench.step_report import COLUMNS, LEGEND, Columns, plain, table, verdicts
from mesh_core.host.session import Session

Turn = Callable[[memoryview], memoryview]


@dataclass(frozen=True)
class BesideBare(Measured):
    """Attributes:
    bare_ms: a turn of the bare ring.
    beyond_bare_ms: a step's total less compute and codec, less the turn of the bare ring that followed it.
    """

    bare_ms: float
    beyond_bare_ms: float
    bare_mb_s: float


BARE_COLUMNS: Columns[BesideBare] = (
    *COLUMNS,
    ("bare pyzmq ms", lambda m: f"{m.bare_ms:.1f}"),
    ("beyond bare ms", lambda m: f"{m.beyond_bare_ms:.2f}"),
    ("pyzmq MB/s", lambda m: f"{m.bare_mb_s:.0f}"),
)

BARE_LEGEND = f"""\
{LEGEND}
bare pyzmq: the same bytes through three processes with DEALER and ROUTER sockets and nothing else, alternating with the
steps. beyond bare: a step less compute and codec, less that; it holds all that the mesh adds, on the wire too."""


def measure(shapes: Sequence[tuple[int, ...]], steps: int, *, encrypted: bool) -> Iterator[BesideBare]:
    """As `mesh_core.bench.step.measure`, with the turns of a bare ring between the steps."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        session = stack.enter_context(loopback_session(folder, encrypted=encrypted))
        turn = stack.enter_context(_ring(folder, encrypted))
        for shape in shapes:
            yield _alternated(session, turn, state_of(shape), steps, encrypted)


def _alternated(session: Session, turn: Turn, state: Tensor, steps: int, encrypted: bool) -> BesideBare:
    payload = state.view(torch.uint8).numpy().data.cast("B")
    taken, bare = [], []
    for step in run(session, state, WARM_UP + steps):
        began = perf_counter()
        back = turn(payload)
        bare.append((perf_counter() - began) * 1e3)
        taken.append(step)
        del back
    taken, bare = taken[WARM_UP:], bare[WARM_UP:]
    return BesideBare(
        **asdict(summary(state.nbytes, encrypted, taken)),
        bare_ms=median(bare),
        beyond_bare_ms=median(uncoded_ms(s) - b for s, b in zip(taken, bare, strict=True)),
        bare_mb_s=state.nbytes * LINKS / 1e3 / median(bare),
    )


@contextmanager
def _ring(folder: Path, encrypted: bool) -> Iterator[Turn]:
    keys = new_keys() if encrypted else None
    with ExitStack() as stack:
        node = ("benchmarks.bare_node", {"keys": keys}, folder / "home")
        nodes = [stack.enter_context(Child(*node, folder=ROOT)) for _ in range(WORKERS)]
        ports = [int(node.hear()["port"]) for node in nodes]
        for one, following in zip(nodes, [*ports[1:], None], strict=True):
            one.tell({"following": following})
        yield stack.enter_context(BareRing(ports, keys)).turn


def main() -> None:
    """Both kinds of link, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="measured per case")
    parser.add_argument("--small", action="store_true", help="states of 1 MB only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--label", default="", help="of the machine")
    parser.add_argument("--save", type=Path, default=None, help="folder for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[BesideBare] = []
    for encrypted in (False, True):
        print("encrypted ..." if encrypted else "plain ...", file=sys.stderr, flush=True)
        results += measure(SHAPES[:1] if options.small else SHAPES, options.steps, encrypted=encrypted)
    text = "\n".join([table(results, BARE_COLUMNS, BARE_LEGEND), "", *verdicts(results)])
    print(json.dumps(plain(results), indent=2) if options.json else text)
    if options.save:
        for path in save(options.save, "step", options.label, plain(results), text):
            print(f"saved {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
