"""LTX-2 inside ComfyUI: where the forward pass of its ``LTXAVModel`` is left, and what of it is the state at a cut.

ComfyUI's own code packs and unpacks latents, makes positions, picks the tokens of guides and runs the local blocks.
Its methods are looked into as they are called, so that timesteps and texts are taken before they are embedded there:
what it hands to its blocks are compressed embeddings, of no use to others. Follows ComfyUI 0.38.1
(``comfy/ldm/lightricks/av_model.py`` and ``model.py``); imports nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mesh_core.errors import UnsupportedInput
from mesh_core.model import CheckpointHeader, Conditioning, ModelSpec, State
from mesh_core.programs.comfy import ComfySide, Expected, RemotePart, intercepted
from mesh_ltx.times import compact

_MODULE = "comfy.ldm.lightricks.av_model"
_OUTPUT_LAYERS = ("norm_out", "proj_out", "audio_norm_out", "audio_proj_out")
_OUTPUT_TABLES = ("scale_shift_table", "audio_scale_shift_table")


@dataclass
class Seen:
    """What one forward pass of ComfyUI showed on its way to the blocks."""

    times: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)


class LtxComfy(ComfySide):
    expects: ClassVar[Sequence[Expected]] = (
        Expected(_MODULE, "LTXAVModel.forward", ("x", "timestep", "context", "attention_mask", "transformer_options")),
        Expected(_MODULE, "LTXAVModel._prepare_timestep", ("timestep", "batch_size", "hidden_dtype")),
        Expected(_MODULE, "LTXAVModel._prepare_context", ("context", "batch_size", "x", "attention_mask")),
        Expected(_MODULE, "LTXAVModel._prepare_positional_embeddings", ("pixel_coords", "frame_rate", "x_dtype")),
        Expected(_MODULE, "LTXAVModel._process_transformer_blocks", ("x", "attention_mask", "transformer_options")),
        Expected(_MODULE, "LTXAVModel._process_output", ("x", "embedded_timestep", "keyframe_idxs")),
    )
    refused: ClassVar[Mapping[str, str]] = {"ref_audio": "LTX's reference audio is not carried across a cut"}

    def header(self, model: nn.Module) -> CheckpointHeader:
        """With the dimensions that a file states in its metadata and no tensor shows."""
        header = super().header(model)
        if not hasattr(model, "audio_inner_dim"):
            return header
        return replace(header, metadata={"config": json.dumps({"transformer": _config(model)})})

    def block_key(self, spec: ModelSpec, block: int) -> tuple[str, int]:
        return "double_block", block

    def run(
        self,
        model: Any,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        cut: int,
        remote: RemotePart,
    ) -> Any:
        seen = Seen()
        own_blocks, own_output = model._process_transformer_blocks, model._process_output

        def blocks(x: Any, context: Any, attention_mask: Any, timestep: Any, pe: Any, **named: Any) -> list[Tensor]:
            options = _options(named.get("transformer_options") or {}, named.get("self_attention_mask"))
            if cut:
                with intercepted(model, "transformer_blocks", list(model.transformer_blocks)[:cut]):
                    x = own_blocks(x, context, attention_mask, timestep, pe, **named)
            return _remotely(x, seen, attention_mask, options, remote)

        def output(x: Sequence[Tensor], embedded_timestep: Any, keyframe_idxs: Any, **named: Any) -> Any:
            none = torch.zeros(1, 1, 1, dtype=x[0].dtype, device=x[0].device)
            with _without_output_layers(model, none):
                return own_output(x, [none, none], keyframe_idxs, **named)

        with ExitStack() as stack:
            _look(stack, model, seen, embedded=cut > 0)
            stack.enter_context(intercepted(model, "_process_transformer_blocks", blocks))
            stack.enter_context(intercepted(model, "_process_output", output))
            return forward(*args, **kwargs)


def _look(stack: ExitStack, model: Any, seen: Seen, *, embedded: bool) -> None:
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
            stack.enter_context(intercepted(layer, "forward", _same))
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


def _options(transformer_options: Mapping[str, Any], self_attention_mask: Any) -> dict[str, Any]:
    """What changes how blocks compute, as the stages know it; named refusals for the rest."""
    if self_attention_mask is not None:
        raise UnsupportedInput(
            "Guides whose strength is not 1 weigh attention in a way that does not cross a cut of LTX-2.",
            hint="strength 1 for all guides, or all blocks local",
        )
    for name in ("run_vx", "run_ax"):
        if not transformer_options.get(name, True):
            raise UnsupportedInput(f"A pass with {name} off does not cross a cut of LTX-2.", hint="all blocks local")
    if transformer_options.get("stg_skip_self_attn"):
        raise UnsupportedInput("Skipping self-attention in all blocks does not cross a cut.", hint="all blocks local")
    across = {transformer_options.get(name, True) for name in ("a2v_cross_attn", "v2a_cross_attn")}
    if len(across) > 1:
        raise UnsupportedInput(
            "A pass in which one stream attends to the other, but not the other way, does not cross a cut of LTX-2.",
            hint="both directions on or off",
        )
    options: dict[str, Any] = {} if across == {True} else {"isolate_modalities": True}
    if blocks := transformer_options.get("stg_self_attn_blocks"):
        options["spatio_temporal_guidance_blocks"] = [int(block) for block in blocks]
    return options


def _remotely(
    x: Sequence[Tensor], seen: Seen, attention_mask: Tensor | None, options: dict[str, Any], remote: RemotePart
) -> list[Tensor]:
    video, audio = x
    silent = not audio.shape[1]
    if silent:
        # Rotary tables cannot be empty: one token that nothing looks at, and whose result nobody takes.
        audio = audio.new_zeros(len(audio), 1, audio.shape[2])
        seen.constants["audio_coords"] = seen.constants["audio_coords"].new_zeros(len(audio), 1, 1, 2)
        seen.times["audio_timestep"] = seen.times["sigma"]
        options = {**options, "isolate_modalities": True}
    values, indices, types = compact(seen.times)
    constants = {**seen.constants, **indices}
    if attention_mask is not None:
        constants |= _masks(attention_mask)
    options |= {f"{name}_dtype": dtype for name, dtype in types.items()}
    state: State = {"hidden_states": video, "audio_hidden_states": audio, "times": values}
    result = remote(state, Conditioning(constants, options))
    heard = result["audio_sample"]
    return [result["sample"], heard[:, :0] if silent else heard]


def _masks(attention_mask: Tensor) -> dict[str, Tensor]:
    """ComfyUI's bias for all queries alike, [B, 1, 1, T], as diffusers' attention takes one, [B, 1, T]."""
    if attention_mask.ndim != 4 or attention_mask.shape[1:3] != (1, 1):
        raise UnsupportedInput(
            f"A text mask of shape {list(attention_mask.shape)} does not cross a cut of LTX-2.", hint="all blocks local"
        )
    bias = attention_mask[:, 0]
    return {"encoder_attention_mask": bias, "audio_encoder_attention_mask": bias}


@contextmanager
def _without_output_layers(model: Any, none: Tensor) -> Iterator[None]:
    """ComfyUI's last method only unpacks: a prediction passes through modulation by nothing, norms and projections."""
    with ExitStack() as stack:
        for name in _OUTPUT_LAYERS:
            stack.enter_context(intercepted(getattr(model, name), "forward", _same))
        for name in _OUTPUT_TABLES:
            stack.enter_context(intercepted(model, name, none.new_zeros(2, 1)))
        yield


def _same(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


def _config(model: Any) -> dict[str, Any]:
    rope = model.split_positional_embedding
    names = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "cross_attention_dim",
        "audio_in_channels",
        "audio_num_attention_heads",
        "audio_attention_head_dim",
        "audio_cross_attention_dim",
        "caption_channels",
        "num_layers",
        "positional_embedding_theta",
        "positional_embedding_max_pos",
        "audio_positional_embedding_max_pos",
        "use_middle_indices_grid",
        "causal_temporal_positioning",
        "timestep_scale_multiplier",
        "av_ca_timestep_scale_multiplier",
        "ff_bias",
        "audio_ff_bias",
        "use_prompt_adaln_single",
        "use_keyframes_abs_pos_embedding",
    )
    config = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return {
        **config,
        "out_channels": model.out_channels,
        "audio_out_channels": model.audio_out_channels,
        "rope_type": getattr(rope, "value", rope),
        "frequencies_precision": "float64" if model.freq_grid_generator.__name__.endswith("_np") else "float32",
    }
