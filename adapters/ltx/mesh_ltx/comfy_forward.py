"""Looking into a forward pass of ComfyUI's ``LTXAVModel``: its methods are replaced while it runs.

So timesteps and texts are taken before they are embedded there: what ComfyUI hands to its blocks are compressed
embeddings, of no use to others. Imports nothing of ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mesh_core.errors import UnsupportedInput
from mesh_core.programs.comfy import intercepted


@dataclass
class Seen:
    """What one forward pass of ComfyUI showed on its way to the blocks."""

    times: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)


def look(stack: ExitStack, model: Any, seen: Seen, *, embedded: bool) -> None:
    """Take times, texts and positions as ComfyUI comes by them.

    Args:
        embedded: whether ComfyUI needs its own embeddings of them, for blocks of its own. If not, no weights are used.
    """
    prepare_timestep, prepare_context = model._prepare_timestep, model._prepare_context
    prepare_positions = model._prepare_positional_embeddings

    def timestep(timestep: Tensor, batch_size: int, hidden_dtype: Any, **named: Any) -> Any:
        if named.get("ref_audio_seq_len"):
            raise UnsupportedInput("Reference audio does not cross a cut of LTX-2.", hint="all blocks local")
        seen.times = _times(model, timestep, named, batch_size)
        if embedded:
            return prepare_timestep(timestep, batch_size, hidden_dtype, **named)
        return [None, None, [None] * 4, None, None], [None, None], None

    def context(context: Tensor, batch_size: int, x: Any, attention_mask: Any = None) -> Any:
        projected = model.caption_proj_before_connector is not False
        widths = (model.inner_dim, model.audio_inner_dim) if projected else (model.caption_channels,) * 2
        video, audio = torch.split(context, list(widths), -1)
        seen.constants["encoder_hidden_states"] = video.contiguous()
        seen.constants["audio_encoder_hidden_states"] = audio.contiguous()
        if embedded:
            return prepare_context(context, batch_size, x, attention_mask)
        return [None, None], attention_mask

    def positions(pixel_coords: Sequence[Tensor], frame_rate: float, x_dtype: Any) -> Any:
        video = pixel_coords[0].to(torch.float32, copy=True)
        video[:, 0] = video[:, 0] * (1.0 / frame_rate)
        seen.constants["video_coords"] = video
        seen.constants["audio_coords"] = pixel_coords[1].to(torch.float32, copy=True)
        return prepare_positions(pixel_coords, frame_rate, x_dtype) if embedded else [(None, None), (None, None)]

    stack.enter_context(intercepted(model, "_prepare_timestep", timestep))
    stack.enter_context(intercepted(model, "_prepare_context", context))
    stack.enter_context(intercepted(model, "_prepare_positional_embeddings", positions))
    if not embedded:
        for layer in (model.patchify_proj, model.audio_patchify_proj):
            stack.enter_context(intercepted(layer, "forward", same))
        if getattr(model, "keyframes_abs_pos_embedding", None) is not None:
            stack.enter_context(intercepted(model, "apply_keyframes_abs_pos_embedding", _mark_keyframes(model, seen)))


def _mark_keyframes(model: Any, seen: Seen) -> Callable[..., Tensor]:
    def marked(x: Tensor, pixel_coords: Tensor, **named: Any) -> Tensor:
        mask: Tensor = model.keyframes_abs_pos_mask(pixel_coords, **named)
        seen.constants["video_keyframes_mask"] = mask.unsqueeze(-1)
        return x

    return marked


def _times(model: Any, timestep: Tensor, named: Mapping[str, Any], batch: int) -> dict[str, Tensor]:
    """The times from which ComfyUI makes each of its embeddings, in the model's own scale.

    Prompts follow the noisiest token; the gate of a stream follows the noisiest token of the other one.
    """
    kept = named.get("grid_mask")
    video = (timestep[:, kept] if kept is not None else timestep) * model.timestep_scale_multiplier
    audio = named["a_timestep"] * model.timestep_scale_multiplier

    def noisiest(times: Tensor) -> Tensor:
        return times.reshape(batch, -1).amax(dim=1)

    return {
        "timestep": video,
        "audio_timestep": audio,
        "sigma": noisiest(video),
        "audio_sigma": noisiest(audio),
        "video_gate": audio.max().expand(batch),
        "audio_gate": video.max().expand(batch),
    }


def same(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands in for a layer that is to change nothing."""
    return tensor
