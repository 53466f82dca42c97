"""Train the FLUX.2 transformer by flow matching on precomputed latents and prompt embeddings.

Prompts are names, rephrasings, names with a background, and nothing (one in ten). Most steps use
texts cut to 40 tokens; every eighth uses all 512 that the pipeline pads to. Stops after
`--seconds`, goes on where it stopped when run again, and writes `transformer/` with the averaged
weights when all steps are done.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from common import (
    BACKGROUNDS,
    DEFAULT_WORK,
    FULL_TEXT,
    SHORT_TEXT,
    TEXT_LAYERS,
    DataSet,
    Ema,
    Stopwatch,
    device_for,
    image_ids,
    is_held_out,
    learning_rate,
    load_data,
    load_state,
    log_line,
    patchify,
    pipeline_mu,
    save_state,
    seed_everything,
    shift,
    text_ids,
    variants,
    with_background,
)
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from muon import Muon
from train_text_encoder import render
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

FULL_TEXT_EVERY = 8
VARIANTS = 4
KINDS = torch.tensor([0.52, 0.12, 0.26, 0.10])  # name, variant, background, empty


@dataclass(frozen=True)
class Corpus:
    """Training pairs on the device.

    latents: `[emoji, background, 64, 128]`, whitened; embeddings: `[prompt, 512, 192]`, where
    prompt 0 is empty and emoji k has the eleven prompts from 1 + 11 k: its name, four variants,
    six backgrounds; trained: `[emoji, background]`, false for held-out pairs.
    """

    latents: torch.Tensor
    embeddings: torch.Tensor
    trained: torch.Tensor


def make_transformer() -> Flux2Transformer2DModel:
    """15 M parameters: 4 double and 8 single blocks, 2 heads of 128; every block begins as the identity."""
    model = Flux2Transformer2DModel(
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=64 * len(TEXT_LAYERS),
        guidance_embeds=False,
    )
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.startswith(("proj_out", "norm_out")):
            torch.nn.init.zeros_(parameter)
    return model


@torch.no_grad()
def encode_images(vae: AutoencoderKLFlux2, images: torch.Tensor) -> torch.Tensor:
    """Whitened, packed latents `[n, 64, 128]` of images in [-1, 1], as the pipeline makes them."""
    packed = patchify(vae.encode(images).latent_dist.mode())
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
    return ((packed - mean) / std).flatten(2).mT


@torch.no_grad()
def embed(work: Path, prompts: list[str], device: torch.device, length: int = FULL_TEXT) -> torch.Tensor:
    """Prompt embeddings `[n, length, 192]` bfloat16, as the pipeline makes them."""
    encoder = Qwen3ForCausalLM.from_pretrained(work / "text_encoder", dtype=torch.float32).to(device)
    ids, mask = render(Qwen2TokenizerFast.from_pretrained(work / "tokenizer"), prompts, length)
    made = torch.empty(len(prompts), length, 64 * len(TEXT_LAYERS), dtype=torch.bfloat16, device=device)
    for part in torch.arange(len(prompts)).split(256):
        out = encoder.model(
            input_ids=ids[part].to(device),
            attention_mask=mask[part].to(device),
            output_hidden_states=True,
            use_cache=False,
        )
        made[part] = torch.cat([out.hidden_states[k] for k in TEXT_LAYERS], dim=-1).bfloat16()
    return made


def load_vae(work: Path, device: torch.device) -> AutoencoderKLFlux2:
    """The trained autoencoder in float32."""
    return AutoencoderKLFlux2.from_pretrained(work / "vae", torch_dtype=torch.float32).to(device).eval()


def make_corpus(work: Path, data: DataSet, device: torch.device, length: int) -> Corpus:
    """Encode every picture on every background and every prompt."""
    vae = load_vae(work, device)
    latents = [
        torch.cat(
            [encode_images(vae, data.on(c, part).to(device)) for part in torch.arange(len(data.emoji)).split(128)]
        )
        for c in BACKGROUNDS.values()
    ]
    prompts = [""]
    for emoji in data.emoji:
        backed = [with_background(emoji.name, b) for b in list(BACKGROUNDS)[1:]]
        prompts += [emoji.name, *variants(emoji), *backed]
    trained = [[not is_held_out(row, b) for b in BACKGROUNDS] for row in range(len(data.emoji))]
    return Corpus(
        torch.stack(latents, 1).bfloat16(),
        embed(work, prompts, device, length),
        torch.tensor(trained, device=device),
    )


def draw(corpus: Corpus, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random batch: latents `[b, 64, 128]` float32 and embeddings `[b, length, 192]`."""
    device = corpus.latents.device
    row = torch.randint(len(corpus.latents), (batch,), device=device)
    kind = torch.multinomial(KINDS.to(device), batch, replacement=True)
    background = torch.randint(1, len(BACKGROUNDS), (batch,), device=device)
    background = torch.where((kind == 2) & corpus.trained[row, background], background, 0)
    variant = torch.randint(VARIANTS, (batch,), device=device)
    form = torch.where(kind == 1, 1 + variant, torch.where(background > 0, VARIANTS + background, 0))
    prompt = torch.where(kind == 3, 0, 1 + row * (VARIANTS + len(BACKGROUNDS)) + form)
    return corpus.latents[row, background].float(), corpus.embeddings[prompt, :length]


def draw_sigmas(batch: int, device: torch.device) -> torch.Tensor:
    """Noise levels: half shifted as 4 to 28 steps shift them, a third logit-normal, the rest on the 4-step grid."""
    mu = pipeline_mu(64, 4)
    shifted = shift(torch.rand(batch, device=device), mu)
    normal = torch.sigmoid(torch.randn(batch, device=device) + 0.3)
    grid = shift(torch.randint(1, 5, (batch,), device=device) / 4, mu)
    choice = torch.rand(batch, device=device)
    return torch.where(choice < 0.5, shifted, torch.where(choice < 0.83, normal, grid))


def flow_loss(
    model: torch.nn.Module, clean: torch.Tensor, text: torch.Tensor, ids: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Mean squared error of the velocity at random noise levels."""
    noise = torch.randn_like(clean)
    sigma = draw_sigmas(len(clean), clean.device)
    level = sigma.view(-1, 1, 1)
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=clean.device.type == "cuda"):
        velocity = model(
            hidden_states=(1 - level) * clean + level * noise,
            encoder_hidden_states=text.float(),
            timestep=sigma,
            img_ids=ids[0],
            txt_ids=ids[1],
            return_dict=False,
        )[0]
    return (velocity.float() - (noise - clean)).square().mean()


def make_optimisers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for everything else."""
    inside = [p for n, p in model.named_parameters() if "transformer_blocks" in n and p.ndim == 2]
    chosen = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(inside, lr=rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--steps", type=int, default=9300)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seconds", type=float, default=540, help="stop after this long; run again to go on")
    parser.add_argument("--limit", type=int, default=0, help="train on this many pictures only, to try things out")
    parser.add_argument("--device")
    arguments = parser.parse_args()

    seed_everything(3)
    device, clock = device_for(arguments.device), Stopwatch(arguments.seconds)
    data = load_data(arguments.work)
    if arguments.limit:
        data = DataSet(data.emoji[: arguments.limit], data.rgba[: arguments.limit])
    corpus = make_corpus(arguments.work, data, device, FULL_TEXT)
    print(f"corpus ready after {clock.elapsed:.0f} s", flush=True)

    model = make_transformer().to(device)
    optimisers = make_optimisers(model, arguments.rate)
    ema = Ema(model, 0.9995)
    state = arguments.work / "state" / "transformer.safetensors"
    step = load_state(state, model, ema, optimisers)
    torch.manual_seed(step + 1)
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    places = {n: (image_ids().to(device), text_ids(n).to(device)) for n in (SHORT_TEXT, FULL_TEXT)}
    total, counted = torch.zeros((), device=device), 0
    while step < arguments.steps and not clock.over:
        full = step % FULL_TEXT_EVERY == 0
        length, batch = (FULL_TEXT, arguments.batch // 8) if full else (SHORT_TEXT, arguments.batch)
        loss = flow_loss(model, *draw(corpus, batch, length), places[length])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = arguments.rate * learning_rate(step, arguments.steps)
            optimiser.step()
            optimiser.zero_grad()
        ema.update(step)
        step += 1
        if not full:
            total, counted = total + loss.detach(), counted + 1
        if step % 50 == 0:
            log_line(
                arguments.work / "logs" / "transformer.jsonl",
                step=step,
                loss=total.item() / counted,
                seconds=clock.elapsed,
            )
            if step % 500 == 0:
                print(f"step {step} loss {total.item() / counted:.4f} {clock.elapsed:.0f} s", flush=True)
            total, counted = torch.zeros((), device=device), 0
    save_state(state, model, ema, optimisers, step)
    ema.copy_to(model)
    model.to(torch.bfloat16).save_pretrained(arguments.work / "transformer")
    print(f"{step} of {arguments.steps} steps, {clock.elapsed:.0f} s")


if __name__ == "__main__":
    main()
