"""Measure and show what the exported pipeline draws.

For 200 trained prompts at 4 and at 28 steps: is the drawn picture, by pixel distance, nearest to
the right one among all emoji of the data set? The same for 200 pairs of an emoji and a
background that were never trained together. Then contact sheets. Uses the pipeline with its
default text length, in float32 on the device at hand. Writes `evaluation.json` and the sheets.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from common import (
    BACKGROUNDS,
    DEFAULT_WORK,
    EXAMPLE,
    IMAGE_SIZE,
    SEED,
    DataSet,
    contact_sheet,
    device_for,
    is_held_out,
    load_data,
    with_background,
)
from diffusers import Flux2KleinPipeline
from PIL import Image

COMMON = (
    "grinning face", "crying face", "smiling face with sunglasses", "thinking face", "angry face", "robot",
    "alien", "ghost", "skull", "clown face", "red heart", "broken heart", "thumbs up", "clapping hands",
    "eyes", "brain", "baby", "mermaid", "dog face", "cat face", "fox", "lion", "panda", "pig face",
    "elephant", "penguin", "frog", "octopus", "butterfly", "honeybee", "snail", "whale",
    "rose", "sunflower", "cactus", "evergreen tree", "mushroom", "red apple", "banana", "grapes",
    "watermelon", "strawberry", "carrot", "pizza", "hamburger", "ice cream", "birthday cake", "hot beverage",
    "house", "castle", "mountain", "volcano", "rainbow", "sun", "crescent moon", "snowman",
    "bicycle", "locomotive", "airplane", "rocket", "guitar", "soccer ball", "umbrella", "key",
)  # fmt: skip
NEVER_TRAINED = (
    "pink square", "cyan circle", "purple apple", "blue banana", "green fox", "red elephant", "yellow frog",
    "blue strawberry", "black rose", "orange heart with arrow", "green sun", "purple rocket",
    "crying robot", "cat face with sunglasses", "ghost with hearts", "snowman with party hat",
)  # fmt: skip
ODD = ("", "qwxz blorp", "日本語のテキスト", "🦊", "a very long prompt " * 60)


def generate(pipe: Flux2KleinPipeline, prompts: list[str], steps: int, batch: int = 50) -> torch.Tensor:
    """Pictures `[n, 3, 128, 128]` in [0, 1]; prompt k always starts from the same noise."""
    made = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seeds = [torch.Generator().manual_seed(SEED + start + k) for k in range(len(part))]
        out = pipe(
            prompt=part,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=steps,
            generator=seeds,
            output_type="pt",
        )
        made.append(out.images.float().cpu())
    return torch.cat(made)


def nearest(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Row of the reference at the smallest Euclidean pixel distance, for each picture."""
    return torch.cdist(pictures.flatten(1), references.flatten(1)).argmin(1)


def psnr(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """dB for each picture."""
    return -10 * torch.log10((pictures - references).square().mean((1, 2, 3)).clamp(min=1e-9))


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """PIL images of `[n, 3, h, w]` in [0, 1]."""
    pixels = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels]


def score(
    pipe: Flux2KleinPipeline, data: DataSet, rows: list[int], steps: int, backgrounds: list[str] | None = None
) -> dict:
    """Accuracy of nearest neighbours and fidelity for the given emoji."""
    names = [data.emoji[r].name for r in rows]
    prompts = [with_background(n, b) for n, b in zip(names, backgrounds, strict=True)] if backgrounds else names
    pictures = generate(pipe, prompts, steps)
    wrong: list[str] = []
    fidelity: list[float] = []
    for background in sorted(set(backgrounds or ["white"])):
        references = (data.on(BACKGROUNDS[background]) + 1) / 2
        mine = [k for k in range(len(rows)) if not backgrounds or backgrounds[k] == background]
        targets = torch.tensor([rows[k] for k in mine])
        found = nearest(pictures[mine], references)
        fidelity += psnr(pictures[mine], references[targets]).tolist()
        wrong += [
            f"{prompts[k]} -> {data.emoji[f].name}" for k, f, t in zip(mine, found, targets, strict=True) if f != t
        ]
    return {
        "prompts": len(rows),
        "steps": steps,
        "right": round(1 - len(wrong) / len(rows), 4),
        "psnr_mean_db": round(float(np.mean(fidelity)), 2),
        "psnr_min_db": round(float(np.min(fidelity)), 2),
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model")
    parser.add_argument("--loras", type=Path, default=EXAMPLE / "loras")
    parser.add_argument("--to", type=Path, default=EXAMPLE / "results")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--device")
    arguments = parser.parse_args()

    arguments.to.mkdir(parents=True, exist_ok=True)
    data = load_data(arguments.work)
    pipe = Flux2KleinPipeline.from_pretrained(arguments.model).to(device_for(arguments.device))
    pipe.set_progress_bar_config(disable=True)
    chooser = random.Random(SEED)
    rows = chooser.sample(range(len(data.emoji)), arguments.prompts)
    pairs = [(r, b) for r in range(len(data.emoji)) for b in BACKGROUNDS if is_held_out(r, b)]
    unseen = chooser.sample(pairs, arguments.prompts)
    results = {
        "trained prompts, 4 steps": score(pipe, data, rows, 4),
        "trained prompts, 28 steps": score(pipe, data, rows, 28),
        "emoji and background never seen together, 4 steps": score(
            pipe, data, [r for r, _ in unseen], 4, [b for _, b in unseen]
        ),
    }
    (arguments.to / "evaluation.json").write_text(
        json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for name, result in results.items():
        print(f"{name}: {result['right']:.1%} right, PSNR mean {result['psnr_mean_db']} min {result['psnr_min_db']} dB")

    def sheet(name: str, prompts: list[str], steps: int, columns: int = 8) -> None:
        labels = [p if p else "(empty prompt)" for p in prompts]
        contact_sheet(to_images(generate(pipe, prompts, steps)), labels, columns).save(
            arguments.to / f"{name}.jpg", quality=88
        )

    scattered = [with_background(data.emoji[r].name, b) for r, b in unseen[:16]]
    sheet("contact_sheet", list(COMMON), 4)
    sheet("contact_sheet_28_steps", list(COMMON), 28)
    sheet("random_prompts", [data.emoji[r].name for r in rows[:64]], 4)
    sheet("never_trained", [*scattered, *NEVER_TRAINED, *ODD], 4)
    lora_sheet(pipe, arguments.loras, arguments.to / "loras.jpg")


def lora_sheet(pipe: Flux2KleinPipeline, loras: Path, to: Path) -> None:
    """A row for the base model and, for each LoRA, rows at strength 1 and 0."""
    prompts = [
        "crying face",
        "fox",
        "red apple",
        "rocket",
        "house",
        "red heart",
        "meshling",
        "meshling on a blue background",
    ]
    pictures, labels = [generate(pipe, prompts, 4)], list(prompts)
    for name in ("night", "meshling"):
        if not (loras / f"{name}.safetensors").is_file():
            continue
        pipe.load_lora_weights(loras, weight_name=f"{name}.safetensors", adapter_name=name)
        for strength in (1.0, 0.0):
            pipe.set_adapters([name], [strength])
            pictures.append(generate(pipe, prompts, 4))
            labels += [f"{name} {strength}: {p}" for p in prompts]
        change = (pictures[-1] - pictures[0]).abs().max().item()
        print(f"{name}: largest difference from the base model at strength 0: {change:.1e}")
        pipe.unload_lora_weights()
    contact_sheet(to_images(torch.cat(pictures)), labels, len(prompts)).save(to, quality=88)


if __name__ == "__main__":
    main()
