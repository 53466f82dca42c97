"""A FLUX.2 transformer of real size cut over two GPUs of one machine: what does each way of crossing cost?

    python -m benchmarks.two_gpus --save benchmarks/results/two-gpus.md

The host's blocks are on the first GPU, the others in a worker process on the second. Weights are random, in bfloat16;
the steps are those of an Euler sampler, so that the state changes from step to step as in a real generation. In one
run: the uncut model on one GPU; each cut with each codec over encrypted loopback, and with the codec left open; and a
copy of the state from GPU to GPU, which is the least that any way of crossing can take. Cells are run in the order of
their importance until ``--minutes`` are over; those that were not reached are named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter
from typing import Any

from benchmarks.split_on_gpu import (
    forward_of,
    generate,
    pictures,
    random_inputs,
    random_model,
    report_and_save,
    start_worker,
)

WAYS: tuple[tuple[str, str | None], ...] = (
    ("lossless", "raw"),
    ("lossless", None),
    ("transparent", "entropy"),
    ("transparent", None),
    ("transparent", "hevc"),
    ("balanced", None),
    ("fast", None),
)
"""Quality, and the codec that is asked for; None leaves it to the choice."""

COLUMNS = ["pixels", "batch", "steps", "cut", "quality", "asked", "exact", "ms_per_step", "of_uncut", "MB_per_step"]
COLUMNS += ["bits", "codec_ms", "wire_ms", "overhead_ms", "idle_1", "idle_2", "chosen"]


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    pixels: int
    batch: int
    steps: int
    cut: int
    quality: Any
    codec: str | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=pictures(), default="klein-9b")
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"], metavar=("HOST", "WORKER"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 1536], help="pixels; a token is 16 x 16 of them")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 28])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--folder", default=None, help="where the temporary checkpoint goes")
    parser.add_argument("--save", type=Path, default=None, help="markdown file; a .json goes beside it")
    arguments = parser.parse_args()
    report_and_save(arguments, run, markdown)


def run(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Any]:
    import torch

    from mesh_core.builtin import installed_plugins
    from mesh_core.model.checkpoint import read_header
    from mesh_core.model.library import recognise
    from mesh_core.model.spans import BlockSpan
    from mesh_core.programs.identity import identify
    from mesh_core.system.device import label

    end = monotonic() + arguments.minutes * 60
    here, there = (torch.device(d) for d in arguments.devices)
    model = random_model(arguments.geometry, here)
    model.save_pretrained(folder / "models" / arguments.geometry, max_shard_size="8GB")
    checkpoint = recognise(read_header(folder / "models" / arguments.geometry), installed_plugins())
    identity = identify(checkpoint)
    shapes = list(product(arguments.sizes, arguments.batches))
    uncut = {shape: generate(forward_of(model), inputs_of(model, *shape, here), 4, here) for shape in shapes}
    copies = {shape: copy_ms(model, *shape, here, there) for shape in shapes}
    prepared = {shape: inputs_of(model, *shape, here) for shape in shapes}
    del model
    if here.type == "cuda":
        torch.cuda.empty_cache()
    worker = start_worker(stack, folder, "second-gpu", arguments.devices[1])
    build = builder(checkpoint, here)
    # Every cut's blocks are taken from these, so that a cell costs no loading.
    whole = build(BlockSpan(0, checkpoint.spec.blocks))
    engines = video_engines()
    # What codecs cost here is measured beside the first steps that leave the choice open; it is kept for all others.
    settling = Cell(*shapes[0], 8, checkpoint.spec.blocks // 2, "transparent", None)
    measure(settling, checkpoint, identity, worker, prepared[shapes[0]], uncut[shapes[0]], here, build)
    wanted = list(cells(arguments, checkpoint.spec.blocks, "NVENC" in engines))
    rows = [
        tried(cell, checkpoint, identity, worker, prepared[c], uncut[c], here, build)
        for cell in wanted
        if monotonic() <= end and (c := (cell.pixels, cell.batch))
    ]
    del whole
    return {
        "geometry": arguments.geometry,
        "devices": [label(here), label(there)],
        "torch": torch.__version__,
        "uncut_ms": {f"{p}x{p}, batch {b}": result[1] for (p, b), result in uncut.items()},
        "copy_ms": {f"{p}x{p}, batch {b}": ms for (p, b), ms in copies.items()},
        "video_engines": engines,
        "rows": rows,
        "not_reached": [vars(cell) for cell in wanted[len(rows) :]],
    }


def tried(cell: Cell, *rest: Any) -> dict[str, Any]:
    """As `measure`; one way that does not work here must not cost the others, and is a result too."""
    try:
        return measure(cell, *rest)
    except Exception as error:
        return {**vars(cell), "error": f"{type(error).__name__}: {error}"[:300]}


def video_engines() -> list[str]:
    """What PyNvVideoCodec can open here."""
    from mesh_codec.hevc.nvvideo import NvVideoEngine

    return [name for name, works in zip(("NVENC", "NVDEC"), NvVideoEngine().probe(), strict=True) if works]


def cells(arguments: argparse.Namespace, blocks: int, encodes: bool) -> Iterator[Cell]:
    """Without repetition: the middle cut of the first size in every way, then with more steps; the middle cut of the
    other sizes; all other cuts, one after the other, since the worker loads what a cut adds; then all that is left.
    Video in software would take seconds a step: it is only run
    where the GPU ``encodes``."""
    ways = [way for way in WAYS if encodes or way[1] != "hevc"]
    first, more = arguments.steps[0], arguments.steps[1:]
    half, others = blocks // 2, (blocks // 4, blocks * 3 // 4)
    shapes = list(product(arguments.sizes, arguments.batches))
    few: tuple[tuple[Any, str | None], ...] = (("lossless", None), ("transparent", None))
    order = [Cell(*shapes[0], first, half, *way) for way in ways]
    order += [Cell(*shapes[0], steps, half, *way) for steps, way in product(more, few)]
    order += [Cell(*shape, first, half, *way) for shape, way in product(shapes[1:], few)]
    order += [Cell(*shape, first, cut, *way) for cut, shape, way in product(others, shapes, few)]
    order += [Cell(*shapes[0], steps, half, *way) for steps, way in product(more, ways)]
    order += [Cell(*s, first, half, *way) for s, way in product(shapes, ways)]
    order += [Cell(*s, steps, half, *way) for s, steps, way in product(shapes, more, few)]
    order += [Cell(*s, steps, half, *way) for s, steps, way in product(shapes, more, ways)]
    yield from dict.fromkeys(order)


def inputs_of(model: Any, pixels: int, batch: int, device: Any) -> dict[str, Any]:
    inputs = random_inputs(model, pixels, device)
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        inputs[name] = inputs[name].repeat(batch, *[1] * (inputs[name].ndim - 1))
    return inputs


def copy_ms(model: Any, pixels: int, batch: int, here: Any, there: Any) -> float:
    """Median milliseconds of a copy of the state at a cut from device to device."""
    import torch

    from mesh_core.system.device import synchronise

    tokens = (pixels // 16) ** 2 + random_inputs(model, 16, "cpu")["txt_ids"].shape[0]
    state = torch.randn(batch, tokens, model.inner_dim, device=here).bfloat16()
    times = []
    for _ in range(20):
        synchronise(here)
        began = perf_counter()
        state.to(there)
        synchronise(there)
        times.append((perf_counter() - began) * 1e3)
    return median(times[5:])


def builder(checkpoint: Any, device: Any) -> Callable[[Any], Any]:
    """Makes stages of spans that share their parameters."""
    import torch

    from mesh_core.model.numerics import Numerics
    from mesh_core.model.pool import ParameterPool
    from mesh_core.model.weights import WeightReader

    pool = ParameterPool()

    def build(span: Any) -> Any:
        reader = WeightReader(checkpoint.header, pool=pool)
        return checkpoint.adapter.build_stage(
            checkpoint.spec, span, reader, device=device, numerics=Numerics(torch.bfloat16)
        )

    return build


def measure(
    cell: Cell, checkpoint: Any, identity: Any, worker: str, inputs: dict[str, Any], uncut: Any, device: Any,
    build: Callable[[Any], Any],
) -> dict[str, Any]:  # fmt: skip
    import torch

    from mesh_core.builtin import installed_plugins
    from mesh_core.host.options import SessionOptions
    from mesh_core.host.runner import SplitRunner, open_session, place
    from mesh_core.model.numerics import Numerics

    options, plugins = (
        SessionOptions(Numerics(torch.bfloat16), device, cell.quality, codec=cell.codec),
        installed_plugins(),
    )
    placement = place(checkpoint, f":{cell.cut}", [worker], plugins, options, None)
    session = open_session(lambda: identity, placement, options, plugins, None)
    runner = SplitRunner(checkpoint, placement.plan, build(placement.plan.local), session)
    try:
        # The first generation warms both ends up, and lets the choice learn what steps cost here.
        generate(runner, inputs, 4, device)
        runner.stats.clear()
        result, ms = generate(runner, inputs, cell.steps, device)
        steps = runner.stats.steps[1:]
    finally:
        runner.close()
    del runner
    if device.type == "cuda":
        torch.cuda.empty_cache()

    def mid(value: Callable[[Any], float]) -> float:
        return median(value(s) for s in steps)

    raw = mid(lambda s: s.hops[0].in_raw)
    return {
        **vars(cell),
        "asked": cell.codec or "open",
        "exact": bool(torch.equal(result[0], uncut[0][0])) if cell.steps == 4 else None,
        "ms_per_step": ms,
        "of_uncut": ms / uncut[1],
        "MB_per_step": mid(lambda s: s.hops[0].in_coded + s.hops[-1].out_coded) / 1e6,
        "bits": 16 * mid(lambda s: s.hops[0].in_coded) / raw,
        "codec_ms": mid(lambda s: s.encode_ms + s.decode_ms + sum(h.encode_ms + h.decode_ms for h in s.hops)),
        "wire_ms": mid(lambda s: s.wire_ms),
        "overhead_ms": mid(lambda s: s.overhead_ms),
        "idle_1": 1 - mid(lambda s: s.local_ms) / ms,
        "idle_2": 1 - mid(lambda s: s.hops[0].compute_ms) / ms,
        "chosen": steps[-1].reason or steps[-1].codec,
    }


def markdown(report: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    def listed(times: dict[str, float]) -> str:
        return "; ".join(f"{name}: {ms:.2f} ms" for name, ms in times.items())

    good, bad = ([r for r in report["rows"] if ("error" in r) is failed] for failed in (False, True))
    lines = [
        f"# {report['geometry']}, random weights, over two GPUs: {' and '.join(report['devices'])}",
        "",
        f"torch {report['torch']}, bfloat16; loopback with CURVE. Medians over the steps of an Euler sampler, but for "
        "the first. idle: share of a step in which that GPU computes no block.",
        "",
        f"Uncut on one GPU: {listed(report['uncut_ms'])}.",
        "",
        f"Copy of the state from GPU to GPU, the least that a cut can take: {listed(report['copy_ms'])}.",
        "",
        "| " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cell(row[c]) for c in COLUMNS) + " |" for row in good),
        "",
    ]
    found = " and ".join(report["video_engines"]) or "none"
    lines.append(f"Video engines that could be opened: {found}. Without NVENC, hevc is not run.")
    lines += [f"Did not work: {r['pixels']}, {r['quality']}, {r['codec']}: {r['error']}" for r in bad]
    if report["not_reached"]:
        lines.append(f"{len(report['not_reached'])} cells were not reached in time; they are listed in the .json file.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
