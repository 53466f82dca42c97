"""A transformer of real size cut over two processes on one GPU: is it exact, and what does the cut cost?

    python -m benchmarks.split_on_gpu --geometry klein-9b --save benchmarks/results/split_on_gpu.md
    python -m benchmarks.split_on_gpu --geometry ltx-2.3 --worker-memory 48GB --steps 4 --save ...

Weights are random, in bfloat16, written to a temporary folder (18 GB for klein-9b, 38 GB for ltx-2.3) so that stages
are read from disk as users read them. In one run: the uncut model's step; then, for each cut and quality, the same step
with the blocks after the cut in worker processes on the same GPU, over encrypted loopback. The steps are those of an
Euler sampler, so that the state changes from step to step as in a real generation. The uncut step is what a GPU that
holds the whole model would need; the difference is what the mesh adds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from threading import Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh_core.crossing.stats import StepStats

GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "flux2-dev": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 8,
            "num_single_layers": 48,
            "num_attention_heads": 48,
            "joint_attention_dim": 15360,
            "guidance_embeds": True,
        },
    ),
    "klein-9b": (
        "Flux2Transformer2DModel",
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    ),
    "klein-4b": (
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
    "small": (
        "Flux2Transformer2DModel",
        {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4, "joint_attention_dim": 512},
    ),
    "ltx-2.3": ("LTX2VideoTransformer3DModel", {"num_layers": 48}),
    "small-ltx": (
        "LTX2VideoTransformer3DModel",
        {
            "num_layers": 4,
            "num_attention_heads": 4,
            "cross_attention_dim": 512,
            "audio_num_attention_heads": 4,
            "audio_cross_attention_dim": 256,
        },
    ),
}
"""Model class, and what of its arguments is not as for all models of the class."""

COMMON: dict[str, dict[str, Any]] = {
    "Flux2Transformer2DModel": {"guidance_embeds": False},
    "LTX2VideoTransformer3DModel": {
        "gated_attn": True,
        "audio_gated_attn": True,
        "cross_attn_mod": True,
        "audio_cross_attn_mod": True,
        "use_prompt_embeddings": False,
        "perturbed_attn": True,
        "rope_type": "split",
    },
}
TEXT_TOKENS = 512
VIDEO_TEXT_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="klein-9b")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a picture's side; a token is 16 x 16 of them")
    parser.add_argument("--video", default="768x512x121", help="width, height and frames of a video")
    parser.add_argument("--worker-memory", default="30GB")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", default=None, help="where the temporary checkpoint goes")
    parser.add_argument("--save", type=Path, default=None, help="markdown file; a .json goes beside it")
    arguments = parser.parse_args()
    report_and_save(arguments, run, markdown)


def report_and_save(
    arguments: argparse.Namespace,
    run: Callable[[argparse.Namespace, Path, ExitStack], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
) -> None:
    """Run a benchmark in a temporary folder with keys and caches of its own; print its table, and keep it if asked."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mesh-bench-", dir=arguments.folder)))
        os.environ["MESH_HOME"] = str(folder / "home")
        report = run(arguments, folder, stack)
    text = markdown(report)
    print(text)
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(text + "\n", encoding="utf-8")
        arguments.save.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Any]:
    import torch

    from mesh_codec.qualities import names
    from mesh_core.builtin import installed_plugins
    from mesh_core.model.checkpoint import read_header
    from mesh_core.model.library import recognise
    from mesh_core.programs.identity import identify
    from mesh_core.system.device import label

    device, notes = torch.device(arguments.device), {}
    inputs, expected, uncut_ms = uncut(arguments, folder, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    checkpoint = recognise(read_header(folder / "models" / arguments.geometry), installed_plugins())
    began = perf_counter()
    identity = identify(checkpoint)
    notes["fingerprint s"] = perf_counter() - began
    notes["checkpoint GB"] = sum(f.stat().st_size for f in checkpoint.header.files) / 1e9
    workers = [
        start_worker(stack, folder, f"worker-{i + 1}", arguments.device, arguments.worker_memory) for i in range(2)
    ]
    blocks, rows = checkpoint.spec.blocks, []
    for cuts, qualities in (
        ((blocks // 4,), names()),
        ((0,), ("lossless",)),
        ((blocks // 4, blocks * 5 // 8), ("lossless", "transparent")),
    ):
        for quality in qualities:
            rows.append(split_row(checkpoint, identity, cuts, quality, workers, inputs, expected, arguments, device))
    return {
        "geometry": arguments.geometry,
        "size": arguments.video if is_video(arguments.geometry) else f"{arguments.size}x{arguments.size}",
        "device": label(device),
        "torch": torch.__version__,
        "uncut_ms": uncut_ms,
        "notes": notes,
        "rows": rows,
    }


def uncut(arguments: argparse.Namespace, folder: Path, device: Any) -> tuple[dict[str, Any], Any, float]:
    """Write the checkpoint; the inputs, the uncut model's result and the milliseconds of its step."""
    model = random_model(arguments.geometry, device)
    video = tuple(int(n) for n in arguments.video.split("x"))
    inputs = random_inputs(model, video if is_video(arguments.geometry) else arguments.size, device)
    model.save_pretrained(folder / "models" / arguments.geometry, max_shard_size="8GB")
    return inputs, *generate(forward_of(model), inputs, arguments.steps, device)


def pictures() -> list[str]:
    """The geometries that make pictures."""
    return [name for name in GEOMETRIES if not is_video(name)]


def is_video(geometry: str) -> bool:
    return GEOMETRIES[geometry][0] == "LTX2VideoTransformer3DModel"


def forward_of(model: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda inputs: model(**inputs, return_dict=False)


def as_tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def generate(
    forward: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], steps: int, device: Any
) -> tuple[tuple[Any, ...], float]:
    """Euler steps from the moment of ``inputs`` to 0: (the states after the last, median milliseconds of a step)."""
    import torch

    from mesh_core.system.device import synchronise

    times, given = [], dict(inputs)
    states = [name for name in ("hidden_states", "audio_hidden_states") if name in inputs]
    with torch.no_grad():
        for number in range(steps):
            for name in {"timestep", "sigma"} & inputs.keys():
                given[name] = inputs[name] * (1 - number / steps)
            synchronise(device)
            began = perf_counter()
            predictions = as_tuple(forward(given))
            synchronise(device)
            times.append((perf_counter() - began) * 1e3)
            for name, prediction in zip(states, predictions, strict=True):
                given[name] = given[name] - prediction / steps
    # The first step also warms up, and carries what does not change.
    return tuple(given[name] for name in states), median(times[1:] or times)


def empty_model(geometry: str, **others: Any) -> Any:
    """Without memory for its weights, in float32.

    Args:
        others: arguments of the model class in place of the geometry's.
    """
    import diffusers
    import torch

    name, config = GEOMETRIES[geometry]
    with torch.device("meta"):
        return getattr(diffusers, name)(**{**COMMON[name], **config, **others})


def random_model(geometry: str, device: Any, **others: Any) -> Any:
    """See `empty_model`; with random weights in bfloat16."""
    import torch

    model = empty_model(geometry, **others).to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.6 / parameter.shape[-1] ** 0.5, generator=generator)
    return model


def random_inputs(model: Any, size: int | tuple[int, ...], device: Any) -> dict[str, Any]:
    """Arguments of forward() for a picture of ``size`` pixels each way, or a video of (width, height, frames)."""
    made = picture_inputs(model, size) if isinstance(size, int) else video_inputs(model, *size)
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in made.items()}


def picture_inputs(model: Any, pixels: int) -> dict[str, Any]:
    import torch

    side = pixels // 16
    generator = torch.Generator("cpu").manual_seed(1)
    img_ids = torch.zeros(side * side, 4, dtype=torch.int64)
    img_ids[:, 1] = torch.arange(side).repeat_interleave(side)
    img_ids[:, 2] = torch.arange(side).repeat(side)
    txt_ids = torch.zeros(TEXT_TOKENS, 4, dtype=torch.int64)
    txt_ids[:, 3] = torch.arange(TEXT_TOKENS)
    guidance = {"guidance": torch.full((1,), 4.0).bfloat16()} if model.config.guidance_embeds else {}
    return {
        **guidance,
        "hidden_states": torch.randn(1, side * side, model.config.in_channels, generator=generator).bfloat16(),
        "encoder_hidden_states": torch.randn(
            1, TEXT_TOKENS, model.config.joint_attention_dim, generator=generator
        ).bfloat16(),
        "timestep": torch.ones(1).bfloat16(),
        "img_ids": img_ids,
        "txt_ids": txt_ids,
    }


def video_inputs(model: Any, width: int, height: int, frames: int) -> dict[str, Any]:
    """Of the published strides: 32 x 32 pixels and 8 frames to a token, 25 audio tokens to a second of 24 frames."""
    import torch

    generator, config = torch.Generator("cpu").manual_seed(1), model.config
    grid = {"num_frames": (frames - 1) // 8 + 1, "height": height // 32, "width": width // 32}
    tokens, audio = grid["num_frames"] * grid["height"] * grid["width"], round(frames / 24 * 25)

    def noise(*shape: int) -> Any:
        return torch.randn(1, *shape, generator=generator).bfloat16()

    return {
        "hidden_states": noise(tokens, config.in_channels),
        "audio_hidden_states": noise(audio, config.audio_in_channels),
        "encoder_hidden_states": noise(VIDEO_TEXT_TOKENS, config.cross_attention_dim),
        "audio_encoder_hidden_states": noise(VIDEO_TEXT_TOKENS, config.audio_cross_attention_dim),
        "timestep": torch.tensor([1000.0]),
        "sigma": torch.tensor([1000.0]),
        "use_cross_timestep": True,
        "fps": 24.0,
        "audio_num_frames": audio,
        **grid,
    }


def start_worker(
    stack: ExitStack,
    folder: Path,
    name: str,
    device: str,
    memory: str = "30GB",
    program: Sequence[str] = ("-m", "mesh_core.cli"),
) -> str:
    """The address of a worker process that ends with ``stack``; ``program`` is what Python runs as ``mesh``."""
    command = [sys.executable, *program, "serve", str(folder / "models"), "--port", "0"]
    process = stack.enter_context(
        subprocess.Popen(
            [*command, "--name", name, "--device", device, "--memory", memory], stderr=subprocess.PIPE, text=True
        )
    )
    stack.callback(process.kill)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("listening at "):
            # What it says from here on is read too, or it would wait for that.
            Thread(target=_pass_on, args=(name, process.stderr), daemon=True).start()
            return line.removeprefix("listening at ").strip()
        print(f"{name}: {line}", end="", file=sys.stderr)
    sys.exit(f"{name} did not start")


def _pass_on(name: str, lines: Iterable[str]) -> None:
    for line in lines:
        print(f"{name}: {line}", end="", file=sys.stderr)


def split_row(
    checkpoint: Any,
    identity: Any,
    cuts: tuple[int, ...],
    quality: Any,
    workers: list[str],
    inputs: dict[str, Any],
    expected: Any,
    arguments: argparse.Namespace,
    device: Any,
) -> dict[str, Any]:
    import torch

    from mesh_core.builtin import installed_plugins
    from mesh_core.host.options import SessionOptions
    from mesh_core.host.runner import SplitRunner, open_session, place
    from mesh_core.model.numerics import Numerics
    from mesh_core.model.weights import WeightReader

    bounds = [*cuts, checkpoint.spec.blocks]
    chosen = [(w, f"{a}:{b}") for w, a, b in zip(workers, bounds, bounds[1:], strict=False)]
    codec = "raw" if quality == "lossless" else "entropy"
    options = SessionOptions(Numerics(torch.bfloat16), device, quality, codec=codec)
    plugins = installed_plugins()
    placement = place(checkpoint, f":{cuts[0]}", chosen, plugins, options, None)
    began = perf_counter()
    session = open_session(lambda: identity, placement, options, plugins, None)
    opened = perf_counter() - began
    stage = checkpoint.adapter.build_stage(
        checkpoint.spec,
        placement.plan.local,
        WeightReader(checkpoint.header),
        device=device,
        numerics=Numerics(torch.bfloat16),
    )
    runner = SplitRunner(checkpoint, placement.plan, stage, session)
    generate(runner, inputs, 2, device)
    runner.stats.clear()
    result, ms = generate(runner, inputs, arguments.steps, device)
    steps = runner.stats.steps[1:]
    row = {
        "cut": " + ".join([f":{cuts[0]}", *(span for _, span in chosen)]),
        "quality": quality,
        "exact": all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)),
        "step_ms": ms,
        **medians(steps, bounds[-1] - bounds[0]),
        "open_s": opened,
    }
    runner.close()
    del stage, runner
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def medians(steps: Sequence[StepStats], remote_blocks: int) -> dict[str, float]:
    """What a step cost, by its parts."""
    remote = median(sum(h.compute_ms for h in s.hops) for s in steps)
    return {
        "local_ms": median(s.local_ms for s in steps),
        "remote_compute_ms": remote,
        "block_ms": remote / remote_blocks,
        "codec_ms": median(s.encode_ms + s.decode_ms + sum(h.encode_ms + h.decode_ms for h in s.hops) for s in steps),
        "wire_ms": median(s.wire_ms for s in steps),
        "overhead_ms": median(s.overhead_ms for s in steps),
        "MB_per_step": median(sum(h.in_coded for h in s.hops) + s.hops[-1].out_coded for s in steps) / 1e6,
    }


def markdown(report: dict[str, Any]) -> str:
    names = ["cut", "quality", "exact", "step_ms", "local_ms", "remote_compute_ms", "block_ms", "codec_ms", "wire_ms"]
    names += ["overhead_ms", "MB_per_step", "open_s"]

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [
        f"# {report['geometry']}, random weights, {report['size']}, {report['device']}",
        "",
        f"torch {report['torch']}, bfloat16. Uncut step: {report['uncut_ms']:.1f} ms. Host and workers share the GPU; "
        "the link is loopback with CURVE. Medians.",
        "",
        "; ".join(f"{name}: {value:.1f}" for name, value in report["notes"].items()),
        "",
        "| " + " | ".join(n.replace("_", " ") for n in names) + " |",
        "|" + "---|" * len(names),
    ]
    return "\n".join(lines + ["| " + " | ".join(cell(row[n]) for n in names) + " |" for row in report["rows"]])


if __name__ == "__main__":
    main()
