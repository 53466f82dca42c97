"""The LTX-2 transformer between two cuts: the glue between diffusers' own blocks.

Follows ``LTX2VideoTransformer3DModel.forward`` of diffusers 0.42 operation by operation, so that stages composed over
any cuts give the same bits. B: batch, S: video tokens, A: audio tokens (may be none), T: text tokens, D and E: widths
of the video and the audio stream, U: distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from mesh_core.errors import UnsupportedInput, WireMalformed
from mesh_core.model import Conditioning, Stage, State
from mesh_core.model.adapting import restore_strides
from mesh_ltx.conditions import Times, masks_of, perturbation_of, times_of


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
        times = times_of(state["times"], constants, options)
        masks = masks_of(video.dtype, audio.dtype, constants)
        rotary = self._rotary(video, audio, constants, options)
        if self.span.start == 0:
            video = restore_strides(video, "hidden_states", options)
            audio = restore_strides(audio, "audio_hidden_states", options)
            video, audio = self._enter(video, audio, constants)
        modulation, embedded, audio_embedded = self._modulation(video, audio, times, options)
        text, audio_text = self._text(video, audio, constants)
        perturbed, perturbation, entirely = perturbation_of(len(video), constants, options)
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
            steps = model.config.patch_size_t, model.config.patch_size, model.config.patch_size
            _check_grid(video, (frames, height, width), steps)
            where = model.rope.prepare_video_coords(len(video), frames, height, width, video.device, fps=fps)
        if audio_where is None:
            frames = options["audio_num_frames"]
            _check_grid(audio, (frames,), (model.config.audio_patch_size_t,))
            audio_where = model.audio_rope.prepare_audio_coords(len(video), frames, audio.device)
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
            if when is not None and when.numel() not in (len(stream), len(stream) * stream.shape[1]):
                raise WireMalformed(f"{when.numel()} timesteps came for {list(stream.shape[:2])} tokens.")
            made, plain = layer(when, batch_size=len(stream), hidden_dtype=stream.dtype)
            return tuple(t.view(len(stream), -1, t.size(-1)) for t in (made, plain))

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


def _check_grid(stream: Tensor, sides: tuple[Any, ...], steps: tuple[int, ...]) -> None:
    """Options come over the network: those that coordinates are made from must be the stream's, not enormous."""
    tokens, pairs = stream.shape[1], list(zip(sides, steps, strict=True))
    sound = all(type(side) is int and 0 <= side <= tokens * step for side, step in pairs)
    if not sound or prod(-(-side // step) for side, step in pairs) != tokens:
        raise WireMalformed(f"A grid of {str(sides)[:80]} came for {tokens} tokens.")


def _leave(stream: Tensor, embedded: Tensor, table: Tensor, norm: nn.Module, project: nn.Module) -> Tensor:
    values = table[None, None] + embedded[:, :, None]
    shift, scale = values[:, :, 0], values[:, :, 1]
    out: Tensor = project(norm(stream) * (1 + scale) + shift)
    return out
