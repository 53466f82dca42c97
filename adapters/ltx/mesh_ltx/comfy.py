"""LTX-2 inside ComfyUI: where the forward pass of its ``LTXAVModel`` is left, and what of it is the state at a cut.

ComfyUI's own code packs and unpacks latents, makes positions, picks the tokens of guides and runs the local blocks.
Follows ComfyUI 0.38.1
(``comfy/ldm/lightricks/av_model.py`` and ``model.py``); imports nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mesh_core.errors import UnsupportedInput
from mesh_core.model import CheckpointHeader, Conditioning, ModelSpec, State
from mesh_core.programs.comfy import ComfySide, Expected, RemotePart, intercepted
from mesh_ltx.comfy_forward import Seen, look, same
from mesh_ltx.comfy_model import config_of_model
from mesh_ltx.times import compact

_MODULE = "comfy.ldm.lightricks.av_model"
_OUTPUT_LAYERS = ("norm_out", "proj_out", "audio_norm_out", "audio_proj_out")
_OUTPUT_TABLES = ("scale_shift_table", "audio_scale_shift_table")


class LtxComfy(ComfySide):
    """See `ComfySide`."""

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
        return replace(header, metadata={"config": json.dumps({"transformer": config_of_model(model)})})

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
            look(stack, model, seen, embedded=cut > 0)
            stack.enter_context(intercepted(model, "_process_transformer_blocks", blocks))
            stack.enter_context(intercepted(model, "_process_output", output))
            return forward(*args, **kwargs)


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
            stack.enter_context(intercepted(getattr(model, name), "forward", same))
        for name in _OUTPUT_TABLES:
            stack.enter_context(intercepted(model, name, none.new_zeros(2, 1)))
        yield
