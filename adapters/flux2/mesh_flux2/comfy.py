"""FLUX.2 inside ComfyUI: where its forward is left, and what of it is the state at a cut.

ComfyUI's own code runs from the patching of latents to the last local block, so positions, reference images and
whatever is patched into them are its own. Blocks get (image, text) there and (text, image) in diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

from comfy.ldm.flux.layers import timestep_embedding
from torch import Tensor

from mesh_core.errors import UnsupportedInput
from mesh_core.model import Conditioning, ModelSpec, State
from mesh_core.programs.comfy import ComfySide, Expected, HandOver, RemotePart, hand_over_at, intercepted

_MODEL = "comfy.ldm.flux.model"


class Flux2Comfy(ComfySide):
    """See `ComfySide`."""

    expects: ClassVar[Sequence[Expected]] = (
        Expected(
            _MODEL,
            "Flux.forward_orig",
            (
                "img",
                "img_ids",
                "txt",
                "txt_ids",
                "timesteps",
                "guidance",
                "control",
                "transformer_options",
                "attn_mask",
            ),
        ),
        Expected(_MODEL, "Flux.forward", ("transformer_options",)),
        Expected("comfy.ldm.flux.layers", "timestep_embedding", ("t", "dim")),
    )
    patches: ClassVar[frozenset[str]] = frozenset({"post_input"})
    refused: ClassVar[Mapping[str, str]] = {
        "attention_mask": "FLUX.2's blocks on a worker take no attention mask",
    }

    def block_key(self, spec: ModelSpec, block: int) -> tuple[str, int]:
        doubles = spec.config["num_layers"]
        return ("double_block", block) if block < doubles else ("single_block", block - doubles)

    def run(
        self,
        model: Any,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        cut: int,
        remote: RemotePart,
    ) -> Any:
        own = model.forward_orig
        parameters = inspect.signature(own)

        def in_place(*inner: Any, **named: Any) -> Tensor:
            inputs = parameters.bind(*inner, **named)
            inputs.apply_defaults()
            _refuse(inputs.arguments)
            if cut == 0:
                return remote(*_at_start(model, inputs.arguments))["sample"]
            return _behind_blocks(model, own, inputs, cut, remote)

        with intercepted(model, "forward_orig", in_place):
            return forward(*args, **kwargs)


def _refuse(inputs: Mapping[str, Any]) -> None:
    if inputs.get("control") is not None:
        raise UnsupportedInput("ControlNet residuals do not cross a cut.", hint="all blocks local, or no ControlNet")
    if inputs.get("attn_mask") is not None:
        raise UnsupportedInput("An attention mask does not cross a cut of FLUX.2.", hint="all blocks local")
    if inputs.get("timestep_zero_index") is not None:
        raise UnsupportedInput(
            "References with a timestep of their own do not cross a cut of FLUX.2.", hint="all blocks local"
        )


def _at_start(model: Any, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
    """Cut 0: ComfyUI only patched the latents."""
    if inputs["transformer_options"].get("patches", {}).get("post_input"):
        raise UnsupportedInput("A patch of the embedded input needs the first block here.", hint="one local block")
    state: State = {"hidden_states": inputs["img"], "timestep": inputs["timesteps"]}
    if model.params.guidance_embed and inputs["guidance"] is not None:
        state["guidance"] = inputs["guidance"]
    return state, _conditioning(inputs["img_ids"], inputs["txt_ids"], inputs["txt"])


def _behind_blocks(model: Any, own: Callable[..., Tensor], inputs: Any, cut: int, remote: RemotePart) -> Tensor:
    arguments = inputs.arguments
    doubles = len(model.double_blocks)
    seen: dict[str, Tensor] = {"img_ids": arguments["img_ids"], "txt_ids": arguments["txt_ids"]}

    def look(embedded: dict[str, Any]) -> dict[str, Any]:
        seen.update(img_ids=embedded["img_ids"], txt_ids=embedded["txt_ids"])
        return embedded

    key = ("double_block", cut) if cut < doubles else ("single_block", cut - doubles)
    options = hand_over_at(arguments["transformer_options"], key)
    patches = options.get("patches", {})
    # Last of its kind: it sees the positions that all others leave.
    options["patches"] = {**patches, "post_input": [*patches.get("post_input", []), look]}
    arguments["transformer_options"] = options
    # At this cut ComfyUI computes the single blocks' modulation, which is not here, and does not use it.
    unused = cut == doubles
    try:
        with intercepted(model.single_stream_modulation, "forward", _nothing) if unused else nullcontext():
            own(*inputs.args, **inputs.kwargs)
    except HandOver as here:
        state: State = {"hidden_states": here.arguments["img"], "temb": _embedded(model, arguments)}
        if cut < doubles:
            state["encoder_hidden_states"] = here.arguments["txt"]
        return remote(state, _conditioning(seen["img_ids"], seen["txt_ids"], arguments["txt"]))["sample"]
    raise UnsupportedInput(
        f"ComfyUI did not come to block {cut}: another node replaced the forward pass of this model.",
        hint="the workflow without that node, or all blocks local",
    )


def _nothing(embedded: Tensor) -> tuple[None, None]:
    return None, None


def _embedded(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What all blocks are modulated by, [B, D], computed as ``forward_orig`` does; blocks only see what follows."""
    dtype = inputs["img"].dtype
    embedded: Tensor = model.time_in(timestep_embedding(inputs["timesteps"], 256).to(dtype))
    if model.params.guidance_embed and inputs["guidance"] is not None:
        embedded = embedded + model.guidance_in(timestep_embedding(inputs["guidance"], 256).to(dtype))
    return embedded


def _conditioning(img_ids: Tensor, txt_ids: Tensor, text: Tensor) -> Conditioning:
    return Conditioning({"img_ids": img_ids[0], "txt_ids": txt_ids[0], "encoder_hidden_states": text})
