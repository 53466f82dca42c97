"""One model in one format: resident, streamed on a smaller card, and split over two processes of limited memory."""

from __future__ import annotations

import json
import subprocess
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch

from benchmarks.quantised.exactness import plain_torch
from benchmarks.quantised.limited import CONTEXT, limit, reserved
from benchmarks.quantised.streaming import choose, nbytes, streamed
from benchmarks.split_on_gpu import as_tuple, generate, medians, start_worker
from mesh_core.builtin import installed_plugins
from mesh_core.errors import PlanDoesNotFit
from mesh_core.host.options import SessionOptions
from mesh_core.host.runner import SplitRunner, open_session, place
from mesh_core.model.library import Checkpoint
from mesh_core.model.numerics import Numerics, usual_numerics
from mesh_core.model.plan import WorkerInfo, make
from mesh_core.model.sizes import RESERVE, span_bytes
from mesh_core.model.spans import BlockSpan
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.model.weights import WeightReader
from mesh_core.programs.identity import identify
from mesh_core.system.config import in_bytes


@dataclass(frozen=True)
class Case:
    """What is measured: a model, what it is given, and where."""

    checkpoint: Checkpoint
    inputs: dict[str, Any]
    steps: int
    device: torch.device

    @property
    def numerics(self) -> Numerics:
        formats = installed_plugins().weight_formats()
        return usual_numerics(self.checkpoint.spec, torch.bfloat16, self.device, formats)


def used_by_others() -> int:
    """Bytes of the GPU that are taken before this process begins; 0 where nobody says."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return 0


def used(device: torch.device) -> int:
    """Bytes of the device that are taken by anybody."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


@contextmanager
def fresh(device: torch.device, budget: int | None = None) -> Iterator[None]:
    """Nothing held and nothing noted from before; within ``budget`` if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        limit(budget if budget is not None else 1 << 60)
    yield
    if device.type == "cuda":
        limit(1 << 60)


def whole(case: Case) -> SplitRunner:
    """The model, all of it in this process."""
    checkpoint = case.checkpoint
    stage = checkpoint.adapter.build_stage(
        checkpoint.spec, BlockSpan(0, checkpoint.spec.blocks), WeightReader(checkpoint.header),
        device=case.device, numerics=case.numerics,
    )  # fmt: skip
    return SplitRunner(checkpoint, make(checkpoint.spec, ":", []), stage, None)


def resident(case: Case, runner: SplitRunner, all_ways: bool) -> tuple[tuple[Any, ...], list[dict[str, Any]]]:
    """The result that all other ways must have, and rows: with kernels, and if asked without, and on matrix units."""
    rows, expected = [], None
    weights = [w for w in runner.local.model.parameters() if isinstance(w, StoredWeight)]
    usual = {id(w): w.arithmetic for w in weights}
    formats = {w.label: w.format.arithmetics(w.kind, torch.bfloat16, case.device) for w in weights}
    units = {label: next((n for n in names if "-mm/" in n), None) for label, names in formats.items()}
    for way in ("resident", "resident, plain torch", "resident, matrix units")[: 3 if all_ways else 1]:
        if way.endswith("units"):
            if not any(units.values()):
                continue
            for weight in weights:
                weight.arithmetic = units[weight.label] or weight.arithmetic
        with ExitStack() as stack:
            if way.endswith("torch"):
                stack.enter_context(plain_torch())
            result, ms = generate(runner, case.inputs, case.steps, case.device)
        expected = result if expected is None else expected
        # Another arithmetic gives other bits.
        exact = None if way.endswith("units") else same(result, expected)
        rows.append({"way": way, "step_ms": ms, "exact": exact, "peak_GB": peak_gb()})
        print(f"{way}: {ms:.1f} ms", flush=True)
    for weight in weights:
        weight.arithmetic = usual[id(weight)]
    assert expected is not None and all(bool(e.isfinite().all()) and float(e.abs().max()) > 0 for e in expected)
    return expected, rows


def same(result: Any, expected: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(as_tuple(result), as_tuple(expected), strict=True))


def peak_gb() -> float:
    """What a process with this allocator takes at most."""
    return (reserved()["peak"] + CONTEXT) / 1e9


def streaming(case: Case, runner: SplitRunner, expected: Any, budget: int) -> dict[str, Any]:
    """The same model on one card of ``budget`` bytes; it is resident no more afterwards."""
    model, blocks = runner.local.model, list(runner.local.block_modules())
    sizes = [nbytes(block) for block in blocks]
    resident_bytes = sum(p.nbytes for p in model.parameters()) - sum(
        p.nbytes for block in blocks for p in block.parameters()
    )
    transient = max((p.transient for p in case.checkpoint.spec.parameters.values()), default=0)
    chosen = choose(sizes, budget - RESERVE - transient, resident_bytes)
    with streamed([blocks[i] for i in chosen], case.device), fresh(case.device, budget):
        generate(runner, case.inputs, 2, case.device)
        result, ms = generate(runner, case.inputs, case.steps, case.device)
        row = {
            "way": f"one card of {in_bytes(budget)} that streams {len(chosen)} of {len(blocks)} blocks",
            "step_ms": ms,
            "exact": same(result, expected),
            "peak_GB": peak_gb(),
            "budget_GB": budget / 1e9,
            "streamed_GB": sum(sizes[i] for i in chosen) / 1e9,
        }
    return row


def split(case: Case, expected: Any, folder: Path, budgets: tuple[int, int], others: int) -> dict[str, Any]:
    """Cut as mesh proposes it over this process and a worker, which may take ``budgets`` bytes of the GPU each.

    Args:
        others: see `used_by_others`.

    Raises:
        PlanDoesNotFit: not into these budgets.
    """
    checkpoint, device, plugins = case.checkpoint, case.device, installed_plugins()
    with ExitStack() as stack:
        stack.enter_context(fresh(device, budgets[0]))
        own_context = used(device) - others - reserved()["now"]
        note = folder / "worker-memory.json"
        began = perf_counter()
        memory = f"{(budgets[1] - RESERVE) / 1e9:.3f}GB"
        program = ("-m", "benchmarks.quantised.limited", str(budgets[1]), str(note))
        worker = start_worker(stack, folder, "worker", str(device), memory, program)
        options = SessionOptions(case.numerics, device)
        placement = place(checkpoint, None, [worker], plugins, options, budgets[0])
        session = open_session(lambda: identify(checkpoint), placement, options, plugins, None)
        opened = perf_counter() - began
        print(f"worker ready after {opened:.0f} s, blocks {placement.plan.local} here", flush=True)
        stage = checkpoint.adapter.build_stage(
            checkpoint.spec, placement.plan.local, WeightReader(checkpoint.header), device=device,
            numerics=case.numerics,
        )  # fmt: skip
        runner = SplitRunner(checkpoint, placement.plan, stage, session)
        stack.callback(runner.close)
        generate(runner, case.inputs, 2, device)
        runner.stats.clear()
        result, ms = generate(runner, case.inputs, case.steps, device)
        sleep(0.6)  # the worker notes its memory twice in that time
        mine, theirs = reserved(), json.loads(note.read_text())
        worker_context = max(0, used(device) - others - own_context - mine["now"] - theirs["now"])
        parts = medians(runner.stats.steps[1:], checkpoint.spec.blocks - len(placement.plan.local))
        row = {
            "way": f"split {placement.plan.local} + {placement.plan.remote[0].span}",
            "step_ms": ms,
            "exact": same(result, expected),
            **parts,
            "without_wire_ms": ms - parts["wire_ms"],
            "budget_GB": budgets[0] / 1e9,
            "peak_GB": (mine["peak"] + own_context) / 1e9,
            "worker_budget_GB": budgets[1] / 1e9,
            "worker_peak_GB": (theirs["peak"] + worker_context) / 1e9,
            "contexts_GB": [own_context / 1e9, worker_context / 1e9],
            "local_GB": span_bytes(checkpoint.spec, placement.plan.local) / 1e9,
            "remote_GB": span_bytes(checkpoint.spec, placement.plan.remote[0].span) / 1e9,
            "open_s": opened,
        }
        row["within"] = row["peak_GB"] <= row["budget_GB"] and row["worker_peak_GB"] <= row["worker_budget_GB"]
    return row


def split_somehow(
    case: Case, expected: Any, folder: Path, budgets: Sequence[tuple[int, int]], others: int
) -> Iterator[dict[str, Any]]:
    """In the first of ``budgets`` that the model fits into; those that it does not fit into are rows of their own."""
    for pair in budgets:
        places = [WorkerInfo("host", pair[0]), WorkerInfo("worker", pair[1] - RESERVE)]
        try:
            # Known without starting a worker.
            installed_plugins().hook.mesh_propose_split(model=case.checkpoint.spec, workers=places, links=[None, None])
        except PlanDoesNotFit as error:
            yield {"way": f"split in {in_bytes(pair[0])} and {in_bytes(pair[1])}", "error": str(error)}
        else:
            yield split(case, expected, folder, pair, others)
            return


def tried(way: str, measure: Callable[[], Iterable[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Rows as they come, each told at once; what one way fails of must not cost the others, and is a row too."""
    try:
        for row in measure():
            print(json.dumps(row), flush=True)
            yield row
    except Exception as error:
        traceback.print_exc()
        yield {"way": way, "error": f"{type(error).__name__}: {error}"[:500]}
