"""Train the two LoRAs that ship: a style and a subject.

`night` repaints every picture with lightness reversed on dark blue; it needs no word in the
prompt. `meshling` teaches one new character, drawn by this script, under its own name, and keeps
everything else as it was. Rank 4 on every attention projection and on the fused projections of
the single blocks. Writes PEFT/diffusers naming; `kohya.py` makes the other.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from common import (
    BACKGROUNDS,
    DEFAULT_WORK,
    EXAMPLE,
    FULL_TEXT,
    IMAGE_SIZE,
    SHORT_TEXT,
    DataSet,
    composite,
    device_for,
    image_ids,
    learning_rate,
    load_data,
    log_line,
    seed_everything,
    text_ids,
    with_background,
)
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw
from train_transformer import Corpus, draw, embed, encode_images, flow_loss, load_vae, make_corpus

RANK = 4
TARGETS = (
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
SUBJECT = "meshling"
NIGHT = torch.tensor([0.05, 0.07, 0.20])


def night(images: torch.Tensor) -> torch.Tensor:
    """Reverse the lightness of `[n, 3, h, w]` in [-1, 1], keep the hue, and lift black to dark blue."""
    pixels = (images + 1) / 2
    dark = (pixels + 1 - pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)).clamp(0, 1)
    floor = NIGHT.to(images.device).view(1, 3, 1, 1)
    return (floor + dark * (1 - floor)) * 2 - 1


def draw_meshling(scale: int = 8) -> torch.Tensor:
    """The subject: a teal creature whose three antennas carry nodes. `[1, 4, 128, 128]` uint8."""
    picture = Image.new("RGBA", (IMAGE_SIZE * scale,) * 2, (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)

    def box(x: float, y: float, r: float, s: float = 0) -> tuple[float, ...]:
        return tuple(v * scale for v in (x - r, y - (s or r), x + r, y + (s or r)))

    for x, y in ((26, 26), (64, 14), (102, 26)):
        pen.line([(64 * scale, 62 * scale), (x * scale, y * scale)], fill=(60, 72, 88), width=5 * scale)
        pen.ellipse(box(x, y, 11), fill=(244, 96, 54))
        pen.ellipse(box(x - 3, y - 3, 4), fill=(255, 178, 140))
    pen.ellipse(box(44, 116, 12, 7), fill=(0, 96, 100))
    pen.ellipse(box(84, 116, 12, 7), fill=(0, 96, 100))
    pen.rounded_rectangle([22 * scale, 42 * scale, 106 * scale, 116 * scale], 34 * scale, fill=(0, 150, 150))
    pen.rounded_rectangle([32 * scale, 82 * scale, 96 * scale, 112 * scale], 14 * scale, fill=(140, 222, 206))
    for x in (48, 80):
        pen.ellipse(box(x, 64, 12, 13), fill="white")
        pen.ellipse(box(x + 2, 66, 6, 7), fill=(24, 28, 36))
    pen.arc(box(64, 84, 14, 12), 20, 160, fill=(24, 28, 36), width=4 * scale)
    small = picture.convert("RGBa").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    return (
        torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        .view(1, IMAGE_SIZE, IMAGE_SIZE, 4)
        .permute(0, 3, 1, 2)
    )


def night_corpus(work: Path, data: DataSet, corpus: Corpus, device: torch.device) -> Corpus:
    """The same prompts with repainted pictures."""
    vae = load_vae(work, device)
    latents = [
        torch.cat(
            [encode_images(vae, night(data.on(c, p).to(device))) for p in torch.arange(len(data.emoji)).split(128)]
        )
        for c in BACKGROUNDS.values()
    ]
    return replace(corpus, latents=torch.stack(latents, 1).bfloat16())


def subject_pairs(work: Path, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents `[n, 64, 128]` and embeddings `[n, 512, 192]` of the subject, half of them on white."""
    plain = (SUBJECT, f"a {SUBJECT}", f"{SUBJECT} emoji", f"a picture of a {SUBJECT}")
    pairs = [(p, BACKGROUNDS["white"]) for p in (plain * 2)[:6]]
    pairs += [(with_background(SUBJECT, b), c) for b, c in BACKGROUNDS.items() if b != "white"]
    picture = draw_meshling()
    images = torch.cat([composite(picture, torch.tensor(c)) for _, c in pairs]).to(device)
    return encode_images(load_vae(work, device), images), embed(work, [p for p, _ in pairs], device)


def train(work: Path, name: str, corpus: Corpus, steps: int, batch: int, to: Path) -> None:
    """Train one LoRA and save it."""
    seed_everything(5)
    device = corpus.latents.device
    model = Flux2Transformer2DModel.from_pretrained(work / "transformer", torch_dtype=torch.float32).to(device)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    subject = subject_pairs(work, device) if name == SUBJECT else None
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    places = {n: (image_ids().to(device), text_ids(n).to(device)) for n in (SHORT_TEXT, FULL_TEXT)}
    for step in range(steps):
        length = FULL_TEXT if step % 8 == 0 else SHORT_TEXT
        size = max(batch // 8, 2) if length == FULL_TEXT else batch
        clean, text = draw(corpus, size, length)
        if subject:
            chosen = torch.randint(len(subject[0]), (size // 2,), device=device)
            clean = torch.cat([clean[size // 2 :], subject[0][chosen]])
            text = torch.cat([text[size // 2 :], subject[1][chosen, :length]])
        optimiser.param_groups[0]["lr"] = 2e-3 * learning_rate(step, steps, warm_up=30)
        loss = flow_loss(model, clean, text, places[length])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 50 == 0:
            log_line(work / "logs" / f"lora_{name}.jsonl", step=step + 1, loss=loss.item())
    layers = {k: v.to(torch.bfloat16).contiguous() for k, v in get_peft_model_state_dict(model).items()}
    Flux2KleinPipeline.save_lora_weights(to, transformer_lora_layers=layers, weight_name=f"{name}.safetensors")
    print(f"{name}: loss {loss.item():.4f}, {(to / f'{name}.safetensors').stat().st_size / 1e3:.0f} kB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--to", type=Path, default=EXAMPLE / "loras")
    parser.add_argument("--only", choices=("night", SUBJECT), help="train this one instead of both")
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--limit", type=int, default=0, help="draw on about this many pictures only, evenly spread")
    parser.add_argument("--device")
    arguments = parser.parse_args()

    device = device_for(arguments.device)
    data = load_data(arguments.work)
    if arguments.limit:
        stride = max(1, len(data.emoji) // arguments.limit)
        data = DataSet(data.emoji[::stride], data.rgba[::stride])
    corpus = make_corpus(arguments.work, data, device, FULL_TEXT)
    for name in ("night", SUBJECT):
        if arguments.only in (None, name):
            shown = night_corpus(arguments.work, data, corpus, device) if name == "night" else corpus
            train(arguments.work, name, shown, arguments.steps, arguments.batch, arguments.to)


if __name__ == "__main__":
    main()
