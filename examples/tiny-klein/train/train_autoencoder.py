"""Train the autoencoder: AutoencoderKLFlux2 with few channels.

Latents keep Klein's shape: 32 channels at an eighth of the size, 128 after packing, whitened by
the model's own batch-norm statistics. Whitened latents get noise of up to half their standard
deviation before they are decoded, so that the decoder draws sharp pictures from the imprecise
latents of a small transformer. The loss is L1 on pixels and on their differences at three
scales. Writes `vae/` under the work folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    BACKGROUNDS,
    DEFAULT_WORK,
    DataSet,
    Ema,
    Stopwatch,
    composite,
    device_for,
    learning_rate,
    load_data,
    load_state,
    log_line,
    patchify,
    save_state,
    seed_everything,
    unpatchify,
)
from diffusers import AutoencoderKLFlux2

PEAK_RATE = 2e-3
NOISE = 0.5  # upper end of the latent noise, in standard deviations
SHIFT = 6  # pixels


def make_autoencoder() -> AutoencoderKLFlux2:
    """2.7 M parameters; the decoder is the larger half."""
    return AutoencoderKLFlux2(
        block_out_channels=(32, 48, 64, 64),
        decoder_block_out_channels=(48, 64, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=128,
    )


def sample_pictures(rgba: torch.Tensor, batch: int) -> torch.Tensor:
    """Random pictures, shifted and mirrored, half on white and half on any colour."""
    device = rgba.device
    rows = torch.randint(len(rgba), (batch,), device=device)
    colours = torch.randint(256, (batch, 3), device=device)
    colours[torch.rand(batch, device=device) < 0.5] = 255
    offset = torch.randint(-SHIFT, SHIFT + 1, (2,))
    picked = torch.roll(rgba[rows], tuple(offset.tolist()), (2, 3))
    if torch.rand(()) < 0.5:
        picked = picked.flip(3)
    return composite(picked, colours)


def differences(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Horizontal and vertical pixel differences."""
    return image[..., 1:] - image[..., :-1], image[..., 1:, :] - image[..., :-1, :]


def picture_loss(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """L1 on pixels plus L1 on differences at full, half and quarter size."""
    loss = F.l1_loss(made, real)
    for _ in range(3):
        loss = loss + 0.5 * sum(F.l1_loss(a, b) for a, b in zip(differences(made), differences(real), strict=True))
        made, real = F.avg_pool2d(made, 2), F.avg_pool2d(real, 2)
    return loss


def reconstruct(vae: AutoencoderKLFlux2, images: torch.Tensor, noise: float) -> torch.Tensor:
    """Encode, disturb the whitened latents, decode."""
    mean = vae.encode(images).latent_dist.mean
    packed = patchify(mean)
    spread = packed.float().std((0, 2, 3), keepdim=True).to(packed.dtype)
    amount = noise * torch.rand(len(images), 1, 1, 1, device=images.device)
    return vae.decode(unpatchify(packed + amount * spread * torch.randn_like(packed))).sample


@torch.no_grad()
def fix_statistics(vae: AutoencoderKLFlux2, data: DataSet, device: torch.device) -> None:
    """Set the batch-norm statistics to those of the data set, and make the posterior narrow."""
    moments = []
    for start in range(0, len(data.rgba), 64):
        for colour in list(BACKGROUNDS.values())[:: 3 if start % 128 else 1]:
            images = data.on(colour, slice(start, start + 64)).to(device)
            packed = patchify(vae.encode(images).latent_dist.mean).float()
            moments.append(torch.stack([packed.mean((0, 2, 3)), packed.square().mean((0, 2, 3))]))
    first, second = torch.stack(moments).mean(0)
    vae.bn.running_mean.copy_(first)
    vae.bn.running_var.copy_((second - first.square()).clamp(min=1e-5))
    vae.quant_conv.weight[32:].zero_()
    vae.quant_conv.bias[32:].fill_(-8.0)


@torch.no_grad()
def fidelity(vae: AutoencoderKLFlux2, data: DataSet, device: torch.device, rows: int = 256) -> float:
    """Mean PSNR in dB of every k-th picture on white, without noise."""
    stride = max(1, len(data.rgba) // rows)
    images = data.on(BACKGROUNDS["white"], slice(None, None, stride)).to(device)
    scores = []
    for part in images.split(64):
        made = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        scores.append(10 * torch.log10(4 / (made - part).float().square().mean((1, 2, 3)).clamp(min=1e-9)))
    return torch.cat(scores).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=540, help="stop after this long; run again to go on")
    parser.add_argument("--device")
    arguments = parser.parse_args()

    seed_everything(2)
    device, clock = device_for(arguments.device), Stopwatch(arguments.seconds)
    data = load_data(arguments.work)
    rgba = data.rgba.to(device)
    vae = make_autoencoder().to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(vae, 0.998)
    state = arguments.work / "state" / "vae.safetensors"
    step = load_state(state, vae, ema, [optimiser])
    torch.manual_seed(step + 1)
    encode_decode = torch.compile(reconstruct) if device.type == "cuda" else reconstruct
    vae.train()
    while step < arguments.steps and not clock.over:
        optimiser.param_groups[0]["lr"] = PEAK_RATE * learning_rate(step, arguments.steps)
        images = sample_pictures(rgba, arguments.batch).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            made = encode_decode(vae, images, NOISE)
        loss = picture_loss(made.float(), images)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        ema.update(step)
        step += 1
        if step % 100 == 0:
            log_line(arguments.work / "logs" / "vae.jsonl", step=step, loss=loss.item(), seconds=clock.elapsed)
            if step % 500 == 0:
                print(f"step {step} loss {loss.item():.4f} {clock.elapsed:.0f} s", flush=True)
    save_state(state, vae, ema, [optimiser], step)
    if step >= arguments.steps:
        ema.copy_to(vae)
        vae.eval()
        fix_statistics(vae, data, device)
        vae.to(torch.bfloat16).float()
        print(f"PSNR {fidelity(vae, data, device):.2f} dB after rounding to bf16")
        vae.to(torch.bfloat16).save_pretrained(arguments.work / "vae")


if __name__ == "__main__":
    main()
