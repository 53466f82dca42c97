"""What the conditioning of a call says, in the form in which diffusers' blocks take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mesh_ltx.times import SUFFIX, spread


@dataclass(frozen=True)
class Times:
    """The timesteps of one call, flat, as ``forward`` takes them; sigmas are None where the model needs none.

    ``video_gate`` and ``audio_gate`` are those of the gates between the streams; None: as their scales and shifts.
    """

    video: Tensor
    audio: Tensor
    sigma: Tensor | None
    audio_sigma: Tensor | None
    video_gate: Tensor | None = None
    audio_gate: Tensor | None = None


def times_of(values: Tensor, constants: Mapping[str, Tensor], options: Mapping[str, Any]) -> Times:
    """The timesteps of a call from their distinct ``values`` [U], see `mesh_ltx.times`."""

    def of(name: str, other: Tensor | None = None) -> Tensor | None:
        index = constants.get(f"{name}{SUFFIX}")
        dtype: torch.dtype = getattr(torch, options.get(f"{name}_dtype", ""), values.dtype)
        return other if index is None else spread(values, index, dtype)

    video, sigma = of("timestep"), of("sigma")
    audio = of("audio_timestep", video)
    assert video is not None and audio is not None
    return Times(video, audio, sigma, of("audio_sigma", sigma), of("video_gate"), of("audio_gate"))


def masks_of(video: torch.dtype, audio: torch.dtype, constants: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Masks as blocks take them: what is multiplied (1 keeps) becomes what is added (0 keeps)."""
    text, audio_text = (constants.get(f"{n}encoder_attention_mask") for n in ("", "audio_"))
    own = constants.get("video_self_attention_mask")
    if text is not None and text.ndim == 2:
        text = ((1 - text.to(video)) * -10000.0).unsqueeze(1)
    if audio_text is not None and audio_text.ndim == 2:
        audio_text = ((1 - audio_text.to(audio)) * -10000.0).unsqueeze(1)
    return {
        "encoder_attention_mask": text,
        "audio_encoder_attention_mask": audio_text,
        "self_attention_mask": None if own is None else (1 - own.to(video)) * -10000.0,
    }


def perturbation_of(
    batch: int, constants: Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[frozenset[int], Tensor | None, Any]:
    """Blocks whose self-attention is perturbed, for which elements of the batch, and whether for all."""
    blocks = frozenset(options.get("spatio_temporal_guidance_blocks", ()))
    if not blocks:
        return blocks, None, False
    mask = constants.get("perturbation_mask")
    mask = torch.zeros((batch,)) if mask is None else mask
    mask = mask[:, None, None] if mask.ndim == 1 else mask
    return blocks, mask, torch.all(mask == 0)
