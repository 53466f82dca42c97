"""The FLUX.2 adapter: recognises checkpoints of the architecture and describes them to the core.

A family of this architecture is data: its name, its variants, and whether it embeds a guidance scale. Klein is a
subclass with other data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mesh_core.errors import UnsupportedInput
from mesh_core.model import BlockSpan, CheckpointHeader, Conditioning, Dimensions, ModelAdapter, ModelSpec, Piece, State
from mesh_core.model.adapting import (
    describe_parameters,
    invisible_arguments,
    refuse_attention_arguments,
    unusual_strides,
)
from mesh_flux2.blocks import scope_of, shapes, states
from mesh_flux2.config import INVISIBLE, MODEL_CLASS, config_from_shapes, config_of, make_model
from mesh_flux2.layout import find_layout, layouts, pieces_of
from mesh_flux2.stage import Flux2Stage

_SIZES = range(64, 4097, 16)
"""Of pictures, in pixels, that an autoencoder may say it was made for."""


@dataclass(frozen=True)
class Variant:
    """A published size of a family, and the sampling that its authors recommend."""

    name: str
    double_blocks: int
    single_blocks: int
    heads: int
    defaults: Mapping[str, Any]


class Flux2Adapter(ModelAdapter):
    """FLUX.2 Dev: with guidance embedding."""

    family: ClassVar[str] = "flux2"
    hosts: ClassVar[Mapping[str, str]] = {"comfy": "mesh_flux2.comfy:Flux2Comfy"}
    guidance: ClassVar[bool] = True
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("dev", 8, 48, 48, {"num_inference_steps": 28, "guidance_scale": 4.0}),
    )
    fallback: ClassVar[Mapping[str, Any]] = {"num_inference_steps": 28, "guidance_scale": 4.0}

    def recognise(self, header: CheckpointHeader) -> ModelSpec | None:
        found = find_layout(header.tensors)
        named = header.config.get("_class_name")
        if found is None or named not in (None, MODEL_CLASS):
            return None
        prefix, bfl = found
        config = config_of(header) if named else config_from_shapes(header.tensors, prefix, bfl)
        if bool(config["guidance_embeds"]) != self.guidance:
            return None
        variant, defaults = self._variant(config, header)
        doubles, singles = config["num_layers"], config["num_single_layers"]
        return ModelSpec(
            family=self.family,
            variant=variant,
            config=config,
            block_kinds=("double",) * doubles + ("single",) * singles,
            states=states(doubles, singles, self.guidance),
            constants={
                "img_ids": BlockSpan(0, doubles + singles),
                "txt_ids": BlockSpan(0, doubles + singles),
                "encoder_hidden_states": BlockSpan(0, 1),
            },
            parameters=describe_parameters(
                header,
                skeleton=lambda: make_model(config),
                pieces=lambda name, rows: pieces_of(name, rows, header.tensors, prefix, bfl),
                scope=lambda name: scope_of(name, config),
            ),
            defaults=defaults,
            optional=frozenset({"guidance"}),
            invisible=invisible_arguments(config, INVISIBLE),
        )

    def _variant(self, config: Mapping[str, Any], header: CheckpointHeader) -> tuple[str, Mapping[str, Any]]:
        doubles, singles, heads = config["num_layers"], config["num_single_layers"], config["num_attention_heads"]
        for v in self.variants:
            if (v.double_blocks, v.single_blocks, v.heads) == (doubles, singles, heads):
                return v.name, v.defaults
        return f"custom {doubles}+{singles}, width {heads * config['attention_head_dim']}", self.fallback

    def skeleton(self, spec: ModelSpec) -> nn.Module:
        return make_model(spec.config)

    def stage(self, spec: ModelSpec, span: BlockSpan, model: nn.Module) -> Flux2Stage:
        return Flux2Stage(spec, span, model)

    def begin(self, spec: ModelSpec, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
        _refuse_what_cannot_cross(inputs)
        state: State = {"hidden_states": inputs["hidden_states"], "timestep": inputs["timestep"]}
        if inputs.get("guidance") is not None and self.guidance:
            state["guidance"] = inputs["guidance"]
        ids = {name: inputs[name][0] if inputs[name].ndim == 3 else inputs[name] for name in ("img_ids", "txt_ids")}
        constants = {**ids, "encoder_hidden_states": inputs["encoder_hidden_states"]}
        return state, Conditioning(constants, unusual_strides({"hidden_states": state["hidden_states"]}))

    def recommended(self, spec: ModelSpec, header: CheckpointHeader) -> Mapping[str, Any]:
        """In the size that the autoencoder was made for; the pipeline itself takes 1024 for all."""
        pixels = header.component("vae").get("sample_size")
        size = {"width": pixels, "height": pixels} if pixels in _SIZES else {}
        return {**size, **spec.defaults}

    def finish(self, spec: ModelSpec, state: State) -> Tensor:
        return state["sample"]

    def shapes(self, spec: ModelSpec, cut: int) -> Mapping[str, Dimensions]:
        return {**shapes(spec.config, cut), "sample": ("batch", "image", spec.parameters["proj_out.weight"].shape[0])}

    def layouts(self, spec: ModelSpec) -> Sequence[Mapping[str, tuple[Piece, ...]]]:
        return layouts({name: p.shape for name, p in spec.parameters.items()})


def _refuse_what_cannot_cross(inputs: Mapping[str, Any]) -> None:
    refuse_attention_arguments(inputs, "joint_attention_kwargs")
    if inputs.get("kv_cache_mode") is not None:
        raise UnsupportedInput(
            "Caching the keys and values of reference images (kv_cache_mode) is not carried across a cut.",
            hint="Flux2KleinPipeline instead of its KV variant, or unsplit()",
        )
