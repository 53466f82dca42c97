"""Quantised models of real size on one GPU: kernels, two processes of limited memory, and what one card does alone.

    python -m benchmarks.quantised_on_gpu kernels --save benchmarks/results/quantised-kernels-h200.md
    python -m benchmarks.quantised_on_gpu model --geometry flux2-dev --format fp8mixed --budgets 24GB,18GB --save ...
    python -m benchmarks.quantised_on_gpu model --geometry flux2-dev --format Q4_K --budgets 14GB,8GB 16GB,10GB
    python -m benchmarks.quantised_on_gpu offload --geometry flux2-dev --card 22GB --save ...

``kernels`` compares the kernels with plain torch, bit by bit, and times linear layers. ``model`` writes a file with
random weights in the layout that people download, and runs it resident in one process, on one smaller card that streams
what it cannot hold, and cut by mesh's own proposal over this process and a worker, each of which may take no more of
the GPU than its budget: all weights, activations, transients and CUDA's context. ``offload`` runs the model in bfloat16
with diffusers' group offloading. Each result is compared with the resident one; a row that is not equal says so.
``--tiny`` runs the same in small on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import disk_usage
from time import perf_counter
from typing import Any

from benchmarks.split_on_gpu import (
    GEOMETRIES,
    empty_model,
    forward_of,
    generate,
    is_video,
    random_inputs,
    random_model,
    report_and_save,
)

_ROOM = 40_000_000_000
"""Bytes that the largest checkpoint takes, and some more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    kernels, model, offload = (commands.add_parser(name) for name in ("kernels", "model", "offload"))
    for command in (kernels, model, offload):
        command.add_argument("--device", default="cuda")
        command.add_argument(
            "--folder", default=None, help="where temporary files go; left out: memory, if it has room"
        )
        command.add_argument("--save", type=Path, default=None, help="markdown file; a .json goes beside it")
        command.add_argument("--tiny", action="store_true", help="small, on a CPU")
    kernels.add_argument("--tokens", type=int, default=4608)
    for command in (model, offload):
        command.add_argument("--geometry", choices=GEOMETRIES, default="flux2-dev")
        command.add_argument("--size", type=int, default=1024, help="pixels of a picture's side")
        command.add_argument("--video", default="768x512x121", help="width, height and frames of a video")
        command.add_argument("--steps", type=int, default=6)
        command.add_argument("--blocks", default="", help="fewer blocks: double,single")
    model.add_argument("--format", choices=("fp8mixed", "fp8", "Q4_K", "Q8_0"), default="fp8mixed")
    model.add_argument("--budgets", nargs="+", default=["24GB,18GB"], help="of host and worker; the first that fit")
    model.add_argument("--skip", nargs="*", default=[], choices=("bf16", "ways", "streaming"))
    offload.add_argument("--card", default="22GB")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.device, arguments.size, arguments.steps, arguments.geometry = "cpu", 128, 2, "small"
        arguments.blocks = "1,10"
    if arguments.folder is None and not arguments.tiny and Path("/dev/shm").is_dir():
        arguments.folder = "/dev/shm" if disk_usage("/dev/shm").free > _ROOM else None
    run, markdown = {
        "kernels": (run_kernels, kernels_markdown),
        "model": (run_model, model_markdown),
        "offload": (run_offload, offload_markdown),
    }[arguments.command]
    report_and_save(arguments, run, markdown)


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    import diffusers
    import torch

    from mesh_core.system.device import label

    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    return {"device": label(torch.device(arguments.device)), "versions": versions}


def others_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Arguments of the model class in place of the geometry's."""
    if not arguments.blocks:
        return {}
    double, single = (int(text) for text in arguments.blocks.split(","))
    return {"num_layers": double, "num_single_layers": single}


def size_of(arguments: argparse.Namespace) -> int | tuple[int, ...]:
    return tuple(int(n) for n in arguments.video.split("x")) if is_video(arguments.geometry) else int(arguments.size)


def run_kernels(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Any]:
    import torch

    from benchmarks.quantised import exactness, linears

    device, tiny = torch.device(arguments.device), arguments.tiny
    compared = exactness.compared(device, ((64, 512),)) if tiny else exactness.compared(device)
    refused = exactness.refused()
    wrong = [row for row in compared if row["different"]]
    print(f"{len(compared)} comparisons, {len(wrong)} differ; not used: {refused}", flush=True)
    shapes = ((512, 256),) if tiny else linears.SHAPES
    tokens = 64 if tiny else arguments.tokens
    # The shape that is quoted for all formats; the others for what most people have.
    rows = linears.measured(tokens, shapes[:1], linears.TIMED, device)
    rows += linears.measured(tokens, shapes[1:], ("fp8-scaled/F8_E4M3", "gguf/Q4_K"), device)
    return {**about(arguments), "tokens": tokens, "compared": compared, "not_used": refused, "rows": rows}


def run_model(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Any]:
    import torch

    from benchmarks.quantised import files, rows
    from mesh_core.model.sizes import RESERVE, span_bytes
    from mesh_core.model.spans import BlockSpan
    from mesh_core.system.config import parse_bytes

    others, device = rows.used_by_others(), torch.device(arguments.device)
    changed, notes, found = others_of(arguments), {}, []
    began = perf_counter()
    checkpoint = files.checkpoint_file(arguments.geometry, arguments.format, folder, device, **changed)
    notes["file GB"] = sum(f.stat().st_size for f in checkpoint.header.files) / 1e9
    notes["written in s"] = perf_counter() - began
    print(f"written {notes['file GB']:.1f} GB in {notes['written in s']:.0f} s to {folder}", flush=True)
    inputs = random_inputs(empty_model(arguments.geometry, **changed), size_of(arguments), device)  # type: ignore[arg-type]
    case = rows.Case(checkpoint, inputs, arguments.steps, device)
    whole = span_bytes(checkpoint.spec, BlockSpan(0, checkpoint.spec.blocks))
    budgets = [tuple(parse_bytes(text) for text in pair.split(",")) for pair in arguments.budgets]
    if arguments.tiny:
        budgets = [(RESERVE + whole // 8, RESERVE + whole // 8), (RESERVE + whole * 3 // 4, RESERVE + whole)]

    def bfloat16() -> Iterator[dict[str, Any]]:
        with rows.fresh(device):
            model = random_model(arguments.geometry, device, **changed)
            _, ms = generate(forward_of(model), inputs, arguments.steps, device)
            yield {"way": "bfloat16, resident", "step_ms": ms, "peak_GB": rows.peak_gb()}

    if "bf16" not in arguments.skip:
        found += rows.tried("bfloat16, resident", bfloat16)
    with rows.fresh(device):
        began = perf_counter()
        runner = rows.whole(case)
        notes["loaded in s"] = perf_counter() - began
        print(f"loaded in {notes['loaded in s']:.0f} s", flush=True)
        expected, made = rows.resident(case, runner, "ways" not in arguments.skip)
        found += made
    if "streaming" not in arguments.skip:
        card = budgets[-1 if arguments.tiny else 0][0]
        found += rows.tried("streaming", lambda: [rows.streaming(case, runner, expected, card)])
    runner = None
    found += rows.tried("split", lambda: rows.split_somehow(case, expected, folder, budgets, others))
    return {
        **about(arguments),
        "geometry": arguments.geometry,
        "blocks": checkpoint.spec.blocks,
        "format": arguments.format,
        "size": arguments.video if is_video(arguments.geometry) else f"{arguments.size}x{arguments.size}",
        "weights_GB": whole / 1e9,
        "notes": notes,
        "rows": found,
    }


def run_offload(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Any]:
    import torch

    from benchmarks.quantised import offloading
    from mesh_core.system.config import parse_bytes

    device, size = torch.device(arguments.device), size_of(arguments)
    made = offloading.measured(
        arguments.geometry, size, arguments.steps, parse_bytes(arguments.card), device, others_of(arguments)
    )
    return {**about(arguments), "geometry": arguments.geometry, "size": str(size), "card": arguments.card, **made}


def table(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Columns that no row has are left out."""
    kept = [name for name in names if any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in kept) + " |", "|" + "---|" * len(kept)]
    return lines + ["| " + " | ".join(cell(row.get(name)) for name in kept) + " |" for row in rows]


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def hardware(report: dict[str, Any]) -> str:
    return f"{report['device']}; " + ", ".join(f"{name} {text}" for name, text in report["versions"].items())


def kernels_markdown(report: dict[str, Any]) -> str:
    compared = report["compared"]
    wrong = [row for row in compared if row["different"]]
    lines = [
        f"# Linear layers of stored weights, {report['tokens']} tokens",
        "",
        hardware(report) + ".",
        "",
        f"{len(compared)} comparisons of kernels with plain torch, {sum(row['numbers'] for row in compared)} numbers: "
        f"{len(compared) - len(wrong)} equal to the bit. Kernels not used: {', '.join(report['not_used']) or 'none'}.",
        *(f"Differs: {row}" for row in wrong),
        "",
        "Milliseconds, medians: the layer in bfloat16; dequantised by plain torch and multiplied; dequantised by the "
        "kernel and multiplied; the kernel alone; on matrix units for 8-bit floats, the input quantised.",
        "",
    ]
    names = ["label", "rows", "columns", "bf16_ms", "torch_ms", "kernel_ms", "dequantise_ms", "units_ms", "of_bf16"]
    return "\n".join(lines + table(report["rows"], names))


def model_markdown(report: dict[str, Any]) -> str:
    rows = report["rows"]
    base = next(row["step_ms"] for row in rows if row["way"] == "resident")
    for row in rows:
        if "step_ms" in row:
            row["of_resident"] = row["step_ms"] / base
        if "without_wire_ms" in row:
            row["of_resident_without_wire"] = row["without_wire_ms"] / base
    names = ["way", "step_ms", "of_resident", "of_resident_without_wire", "exact", "within", "budget_GB", "peak_GB"]
    names += ["worker_budget_GB", "worker_peak_GB", "streamed_GB", "wire_ms", "codec_ms", "overhead_ms", "MB_per_step"]
    lines = [
        f"# {report['geometry']}, {report['blocks']} blocks, {report['format']}, random weights, {report['size']}",
        "",
        hardware(report)
        + f". Weights and the largest transient: {report['weights_GB']:.1f} GB. "
        + "; ".join(f"{name}: {value:.1f}" for name, value in report["notes"].items())
        + ".",
        "",
        "Medians over the steps of an Euler sampler. exact: equal to the resident model to the bit. Peaks are those of "
        "torch's allocator and CUDA's context; budgets cap the allocator as a smaller card would. The split's "
        "processes share the GPU and compute in turn; its wire is loopback with CURVE.",
        "",
        *table([row for row in rows if "error" not in row], names),
        "",
    ]
    return "\n".join(lines + [f"{row['way']}: {row['error']}" for row in rows if "error" in row])


def offload_markdown(report: dict[str, Any]) -> str:
    base = report["rows"][0]["step_ms"]
    rows = [{**row, "of_resident": row["step_ms"] / base} for row in report["rows"]]
    lines = [
        f"# {report['geometry']} in bfloat16 with diffusers' group offloading, a card of {report['card']}",
        "",
        hardware(report) + f". {report['parameters'] / 1e9:.1f} G parameters, random; {report['size']}. use_stream and "
        "record_stream, weights in pinned memory.",
        "",
        *table(rows, ["way", "step_ms", "of_resident", "exact", "peak_GB"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
