"""Assemble the trained parts into a directory that `Flux2KleinPipeline.from_pretrained` loads."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import DEFAULT_WORK, EXAMPLE
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

LIMIT = 40_000_000  # bytes of weights, all parts together


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The schedule of FLUX.2 Klein: Euler steps with an exponential, size-dependent shift."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )


def edit(config: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
    """Drop and set entries of a JSON file."""
    facts = json.loads(config.read_text(encoding="utf-8"))
    kept = {k: v for k, v in facts.items() if k not in drop} | changes
    config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def tidy(folder: Path) -> None:
    """Remove local paths, and settle what transformers would otherwise decide by version.

    The text encoder is stored as bfloat16 but loads as float32 unless a dtype is asked for, as
    the other parts do; the tokenizer goes by the class name that Klein's own repository uses.
    """
    for config in (folder / "transformer", folder / "vae"):
        edit(config / "config.json", drop=("_name_or_path",))
    edit(folder / "text_encoder" / "config.json", dtype="float32")
    edit(folder / "tokenizer" / "tokenizer_config.json", drop=("is_local", "local_files_only"))
    edit(folder / "model_index.json", drop=("_name_or_path",), tokenizer=["transformers", "Qwen2TokenizerFast"])
    (folder / "text_encoder" / "generation_config.json").unlink(missing_ok=True)
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--to", type=Path, default=EXAMPLE / "model")
    arguments = parser.parse_args()

    work, bf16 = arguments.work, torch.bfloat16
    pipeline = Flux2KleinPipeline(
        scheduler=scheduler(),
        vae=AutoencoderKLFlux2.from_pretrained(work / "vae", torch_dtype=bf16),
        text_encoder=Qwen3ForCausalLM.from_pretrained(work / "text_encoder", dtype=bf16),
        tokenizer=Qwen2TokenizerFast.from_pretrained(work / "tokenizer"),
        transformer=Flux2Transformer2DModel.from_pretrained(work / "transformer", torch_dtype=bf16),
        is_distilled=True,
    )
    shutil.rmtree(arguments.to, ignore_errors=True)
    pipeline.save_pretrained(arguments.to)
    tidy(arguments.to)
    size = sum(f.stat().st_size for f in arguments.to.rglob("*.safetensors"))
    if size > LIMIT:
        raise SystemExit(f"weights take {size} bytes, more than {LIMIT}")
    print(f"{arguments.to}: {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
