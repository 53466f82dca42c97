"""The LTX-2 transformer between two cuts: the glue between diffusers' own blocks.

Follows ``LTX2VideoTransformer3DModel.forward`` of diffusers 0.42 operation by operation, so that stages composed over
any cuts give the same bits. B: batch, S: video tokens, A: audio tokens (may be none), T: text tokens, D and E: widths
of the video and the audio stream, U: distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mesh_core.errors import UnsupportedInput
from mesh_core.model import Conditioning, Stage, State
from mesh_core.model.adapting import restore_strides
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


class LtxStage(Stage):
    """A span of LTX-2 blocks. State at a cut:

    - at 0: ``hidden_states`` latents [B, S, C], ``audio_hidden_states`` latents [B, A, C_a], ``times`` [U];
    - between: ``hidden_states`` [B, S, D], ``audio_hidden_states`` [B, A, E], ``times`` [U];
    - at N: ``sample`` [B, S, C_out], ``audio_sample`` [B, A, C_a_out].

    Constants: both text contexts, masks, coordinates, and who has which of the ``times``; modulation and the four
    rotary tables follow from these.
    """

    def block_modules(self) -> Iterator[nn.Module]:
        blocks: Any = self.model.transformer_blocks
        yield from blocks[self.span.start : self.span.stop]

    def forward(self, state: State, conditioning: Conditioning) -> State:
        if not len(self.span):
            return state
        model: Any = self.model
        video, audio = state["hidden_states"], state["audio_hidden_states"]
        constants, options = conditioning.constants, conditioning.options
        times = _times(state["times"], constants, options)
        masks = _masks(video.dtype, audio.dtype, constants)
        rotary = self._rotary(video, audio, constants, options)
        if self.span.start == 0:
            video = restore_strides(video, "hidden_states", options)
            audio = restore_strides(audio, "audio_hidden_states", options)
            video, audio = self._enter(video, audio, constants)
        modulation, embedded, audio_embedded = self._modulation(video, audio, times, options)
        text, audio_text = self._text(video, audio, constants)
        perturbed, perturbation, entirely = _perturbation(len(video), constants, options)
        together = not options.get("isolate_modalities", False)

        if perturbed and not model.config.perturbed_attn:
            raise UnsupportedInput(
                "This machine's copy of the model says perturbed_attn=False: it cannot perturb attention.",
                hint="the same config.json on all machines, or a call without spatio-temporal guidance",
            )

        for index, block in enumerate(self.block_modules(), self.span.start):
            video, audio = block(
                hidden_states=video,
                audio_hidden_states=audio,
                encoder_hidden_states=text,
                audio_encoder_hidden_states=audio_text,
                **modulation,
                **rotary,
                **masks,
                use_a2v_cross_attention=together,
                use_v2a_cross_attention=together,
                perturbation_mask=perturbation if index in perturbed else None,
                all_perturbed=entirely if index in perturbed else False,
            )
        if self.span.stop < self.spec.blocks:
            return {"hidden_states": video, "audio_hidden_states": audio, "times": state["times"]}
        sample = _leave(video, embedded, model.scale_shift_table, model.norm_out, model.proj_out)
        audio_sample = _leave(
            audio, audio_embedded, model.audio_scale_shift_table, model.audio_norm_out, model.audio_proj_out
        )
        return {"sample": sample, "audio_sample": audio_sample}

    def _enter(self, video: Tensor, audio: Tensor, constants: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        video, audio = model.proj_in(video), model.audio_proj_in(audio)
        keyframes = constants.get("video_keyframes_mask")
        if keyframes is not None:
            marker = (keyframes > 0).to(dtype=video.dtype)
            video = video + marker * model.keyframes_abs_pos_embedding.to(dtype=video.dtype)
        return video, audio

    def _rotary(
        self, video: Tensor, audio: Tensor, constants: Mapping[str, Tensor], options: Mapping[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        model: Any = self.model
        where, audio_where = constants.get("video_coords"), constants.get("audio_coords")
        if where is None:
            frames, height, width, fps = (options[n] for n in ("num_frames", "height", "width", "fps"))
            where = model.rope.prepare_video_coords(len(video), frames, height, width, video.device, fps=fps)
        if audio_where is None:
            audio_where = model.audio_rope.prepare_audio_coords(len(video), options["audio_num_frames"], audio.device)
        return {
            "video_rotary_emb": model.rope(where, device=video.device),
            "audio_rotary_emb": model.audio_rope(audio_where, device=audio.device),
            "ca_video_rotary_emb": model.cross_attn_rope(where[:, 0:1, :], device=video.device),
            "ca_audio_rotary_emb": model.cross_attn_audio_rope(audio_where[:, 0:1, :], device=audio.device),
        }

    def _modulation(
        self, video: Tensor, audio: Tensor, times: Times, options: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Tensor, Tensor]:
        """What each block's modulation follows from, and the embedded timesteps of the output layers."""
        model: Any = self.model
        config = model.config
        crossed = options.get("use_cross_timestep", False)
        factor = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier

        def embedded(layer: Any, when: Tensor | None, stream: Tensor) -> tuple[Tensor, Tensor]:
            made, plain = layer(when, batch_size=len(stream), hidden_dtype=stream.dtype)
            return tuple(t.view(len(stream), -1, t.size(-1)) for t in (made, plain))  # type: ignore[return-value]

        temb, plain = embedded(model.time_embed, times.video, video)
        audio_temb, audio_plain = embedded(model.audio_time_embed, times.audio, audio)
        prompt = audio_prompt = None
        if model.prompt_modulation and config.use_prompt_adaln_single:
            prompt, _ = embedded(model.prompt_adaln, times.sigma, video)
            audio_prompt, _ = embedded(model.audio_prompt_adaln, times.audio_sigma, audio)
        at: Any = times.audio_sigma if crossed else times.video
        audio_at: Any = times.sigma if crossed else times.audio
        gate: Any = times.video_gate if times.video_gate is not None else at
        audio_gate: Any = times.audio_gate if times.audio_gate is not None else audio_at
        modulation = {
            "temb": temb,
            "temb_audio": audio_temb,
            "temb_prompt": prompt,
            "temb_prompt_audio": audio_prompt,
            "temb_ca_scale_shift": embedded(model.av_cross_attn_video_scale_shift, at, video)[0],
            "temb_ca_gate": embedded(model.av_cross_attn_video_a2v_gate, gate * factor, video)[0],
            "temb_ca_audio_scale_shift": embedded(model.av_cross_attn_audio_scale_shift, audio_at, audio)[0],
            "temb_ca_audio_gate": embedded(model.av_cross_attn_audio_v2a_gate, audio_gate * factor, audio)[0],
        }
        return modulation, plain, audio_plain

    def _text(self, video: Tensor, audio: Tensor, constants: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        text, audio_text = constants["encoder_hidden_states"], constants["audio_encoder_hidden_states"]
        if model.config.use_prompt_embeddings:
            text = model.caption_projection(text).view(len(video), -1, video.size(-1))
            audio_text = model.audio_caption_projection(audio_text).view(len(video), -1, audio.size(-1))
        return text, audio_text


def _times(values: Tensor, constants: Mapping[str, Tensor], options: Mapping[str, Any]) -> Times:
    def of(name: str, other: Tensor | None = None) -> Tensor | None:
        index = constants.get(f"{name}{SUFFIX}")
        dtype: torch.dtype = getattr(torch, options.get(f"{name}_dtype", ""), values.dtype)
        return other if index is None else spread(values, index, dtype)

    video, sigma = of("timestep"), of("sigma")
    audio = of("audio_timestep", video)
    assert video is not None and audio is not None
    return Times(video, audio, sigma, of("audio_sigma", sigma), of("video_gate"), of("audio_gate"))


def _masks(video: torch.dtype, audio: torch.dtype, constants: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
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


def _perturbation(
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


def _leave(stream: Tensor, embedded: Tensor, table: Tensor, norm: nn.Module, project: nn.Module) -> Tensor:
    values = table[None, None] + embedded[:, :, None]
    shift, scale = values[:, :, 0], values[:, :, 1]
    out: Tensor = project(norm(stream) * (1 + scale) + shift)
    return out
