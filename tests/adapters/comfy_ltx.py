"""A stand-in for ComfyUI's ``LTXAVModel``: its methods, their order and their signatures, as of ComfyUI 0.38.1
(``comfy/ldm/lightricks/av_model.py``, ``model.py``), around the layers of diffusers' transformer.

Written from the signatures for tests; the ComfyUI that the tests install is older than this model. What matters here:
timesteps are embedded before the blocks and kept in compressed objects, tokens of dropped guides are left out, blocks
change their inputs in place, and a missing audio latent means zero audio tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor, nn

from tests.adapters import tiny_ltx


class CompressedTimestep:
    """Embeddings of which all tokens of a frame share one."""

    def __init__(self, tensor: Tensor, patches_per_frame: int | None) -> None:
        self.tokens = tensor.shape[1]
        self.step = patches_per_frame or 1
        if self.tokens % self.step:
            self.step = 1
        self.data = tensor[:, :: self.step].contiguous()

    def expand(self) -> Tensor:
        return self.data.repeat_interleave(self.step, dim=1)


class Block(nn.Module):
    """``BasicAVTransformerBlock`` around a block of diffusers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        x: tuple[Tensor, Tensor],
        v_context: Any = None,
        a_context: Any = None,
        attention_mask: Any = None,
        v_timestep: Any = None,
        a_timestep: Any = None,
        v_pe: Any = None,
        a_pe: Any = None,
        v_cross_pe: Any = None,
        a_cross_pe: Any = None,
        v_cross_scale_shift_timestep: Any = None,
        a_cross_scale_shift_timestep: Any = None,
        v_cross_gate_timestep: Any = None,
        a_cross_gate_timestep: Any = None,
        transformer_options: Any = None,
        self_attention_mask: Any = None,
        v_prompt_timestep: Any = None,
        a_prompt_timestep: Any = None,
    ) -> tuple[Tensor, Tensor]:
        vx, ax = x
        perturbed = transformer_options.get("stg_skip_self_attn", False)
        mask = None if attention_mask is None else attention_mask[:, 0]
        silent = not ax.shape[1]
        new_vx, new_ax = self.block(
            vx,
            ax if not silent else ax.new_zeros(len(ax), 1, ax.shape[2]),
            v_context,
            a_context,
            v_timestep.expand(),
            a_timestep,
            v_cross_scale_shift_timestep.expand(),
            a_cross_scale_shift_timestep,
            v_cross_gate_timestep.expand(),
            a_cross_gate_timestep,
            v_prompt_timestep,
            a_prompt_timestep,
            v_pe,
            a_pe,
            v_cross_pe,
            a_cross_pe,
            mask,
            mask,
            use_a2v_cross_attention=transformer_options.get("a2v_cross_attn", True) and not silent,
            use_v2a_cross_attention=transformer_options.get("v2a_cross_attn", True) and not silent,
            perturbation_mask=vx.new_zeros(1, 1, 1) if perturbed else None,
            all_perturbed=perturbed,
        )
        vx.copy_(new_vx)
        if not silent:
            ax.copy_(new_ax)
        return vx, ax


class LTXAVModel(nn.Module):
    """Around ``model``, whose weights may be on the meta device: then nothing of it can compute."""

    def __init__(self, model: LTX2VideoTransformer3DModel) -> None:
        super().__init__()
        config = model.config
        self.own = (model,)  # not registered: names of tensors are those of `state_dict`
        self.patchify_proj, self.audio_patchify_proj = model.proj_in, model.audio_proj_in
        self.transformer_blocks = nn.ModuleList(Block(block) for block in model.transformer_blocks)
        self.scale_shift_table, self.audio_scale_shift_table = model.scale_shift_table, model.audio_scale_shift_table
        self.norm_out, self.audio_norm_out = model.norm_out, model.audio_norm_out
        self.proj_out, self.audio_proj_out = model.proj_out, model.audio_proj_out
        for name, value in tiny_ltx.original_config(model).items():
            if name not in ("_class_name", "rope_type", "frequencies_precision", "cross_attention_adaln"):
                setattr(self, name, value)
        self.inner_dim = config.num_attention_heads * config.attention_head_dim
        self.audio_inner_dim = config.audio_num_attention_heads * config.audio_attention_head_dim
        self.caption_proj_before_connector = not config.use_prompt_embeddings
        self.split_positional_embedding = config.rope_type
        self.freq_grid_generator = generate_freq_grid_np
        self.causal_temporal_positioning = True
        self.num_audio_channels, self.audio_frequency_bins = 3, 2

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return tiny_ltx.to_original(self.own[0])

    def forward(
        self,
        x: Any,
        timestep: Any,
        context: Tensor,
        attention_mask: Any = None,
        frame_rate: float = 25,
        transformer_options: Any = {},  # noqa: B006
        keyframe_idxs: Any = None,
        **kwargs: Any,
    ) -> Any:
        both = isinstance(timestep, (tuple, list)) and len(timestep) == 2
        timestep, kwargs["a_timestep"] = timestep if both else (timestep, timestep)
        dtype, batch, denoise_mask = x[0].dtype, x[0].shape[0], kwargs.pop("denoise_mask", None)
        merged = {**transformer_options, **kwargs}
        x, coords, more = self._process_input(x, keyframe_idxs, denoise_mask, **merged)
        merged |= more
        timestep, embedded, _ = self._prepare_timestep(timestep, batch, dtype, **merged)
        context, attention_mask = self._prepare_context(context, batch, x, attention_mask)
        if attention_mask is not None and not torch.is_floating_point(attention_mask):
            attention_mask = (attention_mask - 1).to(dtype).reshape(batch, 1, 1, -1) * 10000.0
        pe = self._prepare_positional_embeddings(coords, frame_rate, dtype)
        x = self._process_transformer_blocks(
            x,
            context,
            attention_mask,
            timestep,
            pe,
            transformer_options=transformer_options,
            self_attention_mask=merged.get("guide_mask"),
            **merged,
        )
        return self._process_output(x, embedded, keyframe_idxs, **merged)

    def _process_input(self, x: Any, keyframe_idxs: Any, denoise_mask: Any, **kwargs: Any) -> Any:
        vx = x[0]
        ax = x[1] if len(x) > 1 else vx.new_zeros(len(vx), self.num_audio_channels, 0, self.audio_frequency_bins)
        rope, audio_rope = self.own[0].rope, self.own[0].audio_rope
        coords = rope.prepare_video_coords(len(vx), *vx.shape[2:], vx.device, fps=1.0)
        audio_coords = audio_rope.prepare_audio_coords(len(vx), ax.shape[2], vx.device)
        more: dict[str, Any] = {"orig_shape": list(vx.shape)}
        vx = vx.flatten(2).transpose(1, 2)
        if keyframe_idxs is not None:
            more |= {"orig_patchified_shape": list(vx.shape), "grid_mask": denoise_mask}
            vx, coords = vx[:, denoise_mask], coords[:, :, denoise_mask]
        ax = ax.transpose(1, 2).flatten(2)
        return [self.patchify_proj(vx), self.audio_patchify_proj(ax)], [coords, audio_coords], more

    def _prepare_timestep(self, timestep: Tensor, batch_size: int, hidden_dtype: Any, **kwargs: Any) -> Any:
        model, kept, shape = self.own[0], kwargs.get("grid_mask"), kwargs["orig_shape"]
        video = (timestep[:, kept] if kept is not None else timestep) * self.timestep_scale_multiplier
        audio = kwargs["a_timestep"] * self.timestep_scale_multiplier
        factor = self.av_ca_timestep_scale_multiplier / self.timestep_scale_multiplier

        def made(layer: Any, when: Tensor) -> tuple[Tensor, Tensor]:
            values = layer(when.flatten(), batch_size=batch_size, hidden_dtype=hidden_dtype)
            return tuple(v.view(batch_size, -1, v.shape[-1]) for v in values)  # type: ignore[return-value]

        def prompt(layer: Any, when: Tensor) -> Tensor | None:
            return made(layer, when.reshape(batch_size, -1).amax(1))[0] if layer is not None else None

        # With a mask that differs within a frame, nothing is shared.
        size = shape[3] * shape[4]
        frames = video.reshape(batch_size, -1, size) if kept is None and video[0].numel() % size == 0 else None
        shared = frames is not None and bool((frames == frames[:, :, :1]).all())

        def compressed(tensor: Tensor) -> CompressedTimestep:
            return CompressedTimestep(tensor, size if shared else None)

        v_timestep, v_embedded = made(model.time_embed, video)
        a_timestep, a_embedded = made(model.audio_time_embed, audio)
        v_gate = made(model.av_cross_attn_video_a2v_gate, audio.max().expand_as(video.flatten()) * factor)[0]
        a_gate = made(model.av_cross_attn_audio_v2a_gate, video.max().expand_as(audio.flatten()) * factor)[0]
        across = [
            made(model.av_cross_attn_audio_scale_shift, audio)[0],
            compressed(made(model.av_cross_attn_video_scale_shift, video)[0]),
            compressed(v_gate),
            a_gate,
        ]
        prompts = [
            prompt(getattr(model, "prompt_adaln", None), video),
            prompt(getattr(model, "audio_prompt_adaln", None), audio),
        ]
        return [compressed(v_timestep), a_timestep, across, *prompts], [compressed(v_embedded), a_embedded], None

    def _prepare_context(self, context: Tensor, batch_size: int, x: Any, attention_mask: Any = None) -> Any:
        model = self.own[0]
        if self.caption_proj_before_connector:
            return list(torch.split(context, [x[0].shape[-1], x[1].shape[-1]], -1)), attention_mask
        video, audio = torch.split(context, [self.caption_channels] * 2, -1)
        return [model.caption_projection(video), model.audio_caption_projection(audio)], attention_mask

    def _prepare_positional_embeddings(self, pixel_coords: Any, frame_rate: float, x_dtype: Any) -> Any:
        model = self.own[0]
        video, audio = pixel_coords
        video[:, 0] = video[:, 0] * (1.0 / frame_rate)
        if not audio.shape[2]:
            audio = audio.new_zeros(len(audio), 1, 1, 2)
        return [
            (model.rope(video), model.cross_attn_rope(video[:, :1])),
            (model.audio_rope(audio), model.cross_attn_audio_rope(audio[:, :1])),
        ]

    def _process_transformer_blocks(
        self,
        x: Any,
        context: Any,
        attention_mask: Any,
        timestep: Any,
        pe: Any,
        transformer_options: Any = {},  # noqa: B006
        self_attention_mask: Any = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        vx, ax = x
        skipped = transformer_options.get("stg_self_attn_blocks", ())
        for index, block in enumerate(self.transformer_blocks):
            vx, ax = block(
                (vx, ax),
                v_context=context[0],
                a_context=context[1],
                attention_mask=attention_mask,
                v_timestep=timestep[0],
                a_timestep=timestep[1],
                v_pe=pe[0][0],
                a_pe=pe[1][0],
                v_cross_pe=pe[0][1],
                a_cross_pe=pe[1][1],
                v_cross_scale_shift_timestep=timestep[2][1],
                a_cross_scale_shift_timestep=timestep[2][0],
                v_cross_gate_timestep=timestep[2][2],
                a_cross_gate_timestep=timestep[2][3],
                transformer_options={**transformer_options, "stg_skip_self_attn": index in skipped},
                self_attention_mask=self_attention_mask,
                v_prompt_timestep=timestep[3],
                a_prompt_timestep=timestep[4],
            )
        return [vx, ax]

    def _process_output(self, x: Any, embedded_timestep: Any, keyframe_idxs: Any, **kwargs: Any) -> Any:
        vx, ax = x
        v_embedded, a_embedded = embedded_timestep
        if isinstance(v_embedded, CompressedTimestep):
            v_embedded = v_embedded.expand()
        values = self.scale_shift_table[None, None].to(vx.dtype) + v_embedded[:, :, None]
        vx = self.proj_out(self.norm_out(vx) * (1 + values[:, :, 1]) + values[:, :, 0])
        if keyframe_idxs is not None:
            whole = vx.new_zeros(kwargs["orig_patchified_shape"])
            whole[:, kwargs["grid_mask"]] = vx
            vx = whole
        values = self.audio_scale_shift_table[None, None].to(ax.dtype) + a_embedded[:, :, None]
        ax = self.audio_proj_out(self.audio_norm_out(ax) * (1 + values[:, :, 1]) + values[:, :, 0])
        vx = vx.transpose(1, 2).unflatten(2, kwargs["orig_shape"][2:])
        if not ax.numel():
            return vx
        return [vx, ax.unflatten(2, (self.num_audio_channels, self.audio_frequency_bins)).transpose(1, 2)]


def generate_freq_grid_np() -> None:
    """The name by which ComfyUI's choice of precision is told."""
