"""Shared facts and small helpers of the tiny-klein training scripts.

Holds what more than one script must agree on: sizes, folders, the noise schedule, the prompt
forms, and reading and writing of checkpoints (safetensors only). It must not know how any one
part is trained.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

SEED = 20
IMAGE_SIZE = 128  # pixels
LATENT_GRID = 8  # tokens along each side: 128 pixels / 8 (autoencoder) / 2 (packing)
TEXT_LAYERS = (9, 18, 27)  # hidden states that Flux2KleinPipeline reads
SHORT_TEXT = 40  # tokens: every training prompt fits
FULL_TEXT = 512  # tokens: what the pipeline pads to by default

EXAMPLE = Path(__file__).resolve().parent.parent
DEFAULT_WORK = EXAMPLE.parent.parent / "out" / "tiny-klein"

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (214, 60, 56),
    "yellow": (250, 212, 80),
    "green": (86, 170, 92),
    "blue": (70, 120, 214),
    "purple": (142, 90, 190),
    "black": (28, 28, 32),
}
HELD_OUT_SHARE = 5  # one (emoji, background) pair in five is never trained


@dataclass(frozen=True)
class Emoji:
    """One picture of the data set: its CLDR name, its keywords and its place in the atlas."""

    name: str
    keywords: tuple[str, ...]
    sequence: str


@dataclass(frozen=True)
class DataSet:
    """All pictures, `[N, 4, 128, 128]` uint8 RGBA, with their names."""

    emoji: tuple[Emoji, ...]
    rgba: torch.Tensor

    def on(self, colour: tuple[int, int, int], rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Pictures `rows` over a plain colour, `[n, 3, 128, 128]` float32 in [-1, 1]."""
        return composite(self.rgba[rows], torch.tensor(colour))


def composite(rgba: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """`rgba` `[n, 4, H, W]` uint8 over `colour` `[3]` or `[n, 3]` (0-255), in [-1, 1]."""
    pixels = rgba.float() / 255
    under = (colour.to(rgba.device).float() / 255).reshape(-1, 3, 1, 1)
    alpha = pixels[:, 3:]
    return (pixels[:, :3] * alpha + under * (1 - alpha)) * 2 - 1


def load_data(work: Path) -> DataSet:
    """Read what `prepare.py` wrote."""
    facts = json.loads((work / "data" / "emoji.json").read_text(encoding="utf-8"))
    emoji = tuple(Emoji(e["name"], tuple(e["keywords"]), e["sequence"]) for e in facts["emoji"])
    atlas = np.asarray(Image.open(work / "data" / "atlas.png"))
    columns = atlas.shape[1] // IMAGE_SIZE
    tiles = atlas.reshape(-1, IMAGE_SIZE, columns, IMAGE_SIZE, 4).transpose(0, 2, 4, 1, 3)
    rgba = torch.from_numpy(tiles.reshape(-1, 4, IMAGE_SIZE, IMAGE_SIZE)[: len(emoji)].copy())
    return DataSet(emoji, rgba)


def with_background(name: str, background: str) -> str:
    """The prompt form that names a background."""
    return f"{name} on a {background} background"


def variants(emoji: Emoji) -> tuple[str, ...]:
    """Other ways to ask for the same picture on white; always four."""
    described = ", ".join(k for k in emoji.keywords if k != emoji.name)[:48] or emoji.name
    return (f"a {emoji.name}", f"{emoji.name} emoji", f"a picture of a {emoji.name}", described)


def is_held_out(row: int, background: str) -> bool:
    """Whether this pair is kept out of training, to see what composition does."""
    place = list(BACKGROUNDS).index(background)
    return background != "white" and (row * 7 + place * 3) % HELD_OUT_SHARE == 0


def pipeline_mu(tokens: int, steps: int) -> float:
    """The schedule shift of FLUX.2 (`compute_empirical_mu` of the diffusers pipeline)."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


def shift(uniform: torch.Tensor, mu: float) -> torch.Tensor:
    """Exponential time shift: how `FlowMatchEulerDiscreteScheduler` maps sigmas."""
    return math.exp(mu) / (math.exp(mu) + 1 / uniform.clamp(1e-4, 1) - 1)


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """`[b, c, h, w]` to `[b, 4c, h/2, w/2]`, channels ordered (c, row, column) as FLUX.2 does."""
    b, c, h, w = latents.shape
    split = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return split.reshape(b, c * 4, h // 2, w // 2)


def unpatchify(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `patchify`."""
    b, c, h, w = latents.shape
    split = latents.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return split.reshape(b, c // 4, h * 2, w * 2)


def image_ids() -> torch.Tensor:
    """Positions (t, h, w, l) of the image tokens, `[64, 4]`."""
    axis = torch.arange(LATENT_GRID)
    return torch.cartesian_prod(torch.arange(1), axis, axis, torch.arange(1))


def text_ids(length: int) -> torch.Tensor:
    """Positions (0, 0, 0, l) of the text tokens, `[length, 4]`."""
    one = torch.arange(1)
    return torch.cartesian_prod(one, one, one, torch.arange(length))


def device_for(name: str | None) -> torch.device:
    """The device asked for, else a GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def seed_everything(offset: int = 0) -> None:
    """Seed every generator the scripts draw from."""
    random.seed(SEED + offset)
    np.random.seed(SEED + offset)
    torch.manual_seed(SEED + offset)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


class Stopwatch:
    """Tells a training loop when its piece of time is over."""

    def __init__(self, seconds: float) -> None:
        self.begin = time.monotonic()
        self.seconds = seconds

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    @property
    def over(self) -> bool:
        return self.elapsed > self.seconds


def log_line(path: Path, **facts: float) -> None:
    """Append one JSON line to a log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps({k: round(float(v), 6) for k, v in facts.items()}) + "\n")


def learning_rate(step: int, steps: int, warm_up: int = 200, decay: float = 0.35) -> float:
    """Factor on the peak rate: linear warm-up, a plateau, linear decay over the last share."""
    return min((step + 1) / warm_up, 1.0, max((steps - step) / (steps * decay), 0.0))


class Ema:
    """Exponential moving average of parameters, with a short memory at the beginning."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = [p for p in model.parameters() if p.requires_grad]
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], weight)

    @torch.no_grad()
    def copy_to(self, model: torch.nn.Module) -> None:
        for parameter, mean in zip((p for p in model.parameters() if p.requires_grad), self.mean, strict=True):
            parameter.copy_(mean)


def save_state(
    path: Path, model: torch.nn.Module, ema: Ema, optimisers: list[torch.optim.Optimizer], step: int
) -> None:
    """Everything a later piece needs to go on as if it had not stopped."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    tensors |= {f"ema.{n}": m for n, m in zip(ema.names, ema.mean, strict=True)}
    for i, optimiser in enumerate(optimisers):
        for j, slots in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{j}.{k}": torch.as_tensor(v) for k, v in slots.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata={"step": str(step)})
    part.replace(path)


@torch.no_grad()
def load_state(path: Path, model: torch.nn.Module, ema: Ema, optimisers: list[torch.optim.Optimizer]) -> int:
    """Undo `save_state`; the step to go on with, or 0 where there is no checkpoint."""
    if not path.is_file():
        return 0
    from safetensors import safe_open

    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(tensors[f"model.{name}"])
    for name, mean in zip(ema.names, ema.mean, strict=True):
        mean.copy_(tensors[f"ema.{name}"])
    for i, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimiser" and rest.startswith(f"{i}."):
                _, j, slot = rest.split(".")
                state.setdefault(int(j), {})[slot] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def contact_sheet(images: list[Image.Image], labels: list[str], columns: int, size: int = IMAGE_SIZE) -> Image.Image:
    """Images in rows with a caption under each."""
    from PIL import ImageDraw, ImageFont

    font, caption = ImageFont.load_default(10), 28
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (size + 8), rows * (size + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = (i % columns) * (size + 8) + 4, (i // columns) * (size + caption)
        sheet.paste(image.convert("RGB").resize((size, size)), (x, y))
        lines = [label[:24], label[24:48]]
        for k, line in enumerate(lines):
            draw.text((x, y + size + 1 + 12 * k), line, fill="black", font=font)
    return sheet
