"""The FLUX.2 adapter: recognises checkpoints of the architecture and describes them to the core.

A family of this architecture is data: its name, its variants, and whether it embeds a guidance scale. Klein is a
subclass with other data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mesh_core.errors import CheckpointCorrupt, UnsupportedInput
from mesh_core.model import (
    BlockSpan,
    CheckpointHeader,
    Conditioning,
    ModelAdapter,
    ModelSpec,
    ParameterSpec,
    Piece,
    Role,
    State,
    TensorInfo,
)
from mesh_core.model.adapting import (
    describe_parameters,
    diffusers_class,
    full_config,
    refuse_attention_arguments,
    scope_in_stacks,
    unusual_strides,
)
from mesh_flux2.layout import find_layout, layouts, pieces_of
from mesh_flux2.stage import Flux2Stage

_MODEL_CLASS = "Flux2Transformer2DModel"


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
        if found is None or named not in (None, _MODEL_CLASS):
            return None
        prefix, bfl = found
        config = _config(header) if named else _config_from_shapes(header.tensors, prefix, bfl)
        if bool(config["guidance_embeds"]) != self.guidance:
            return None
        variant, defaults = self._variant(config, header)
        doubles, singles = config["num_layers"], config["num_single_layers"]
        return ModelSpec(
            family=self.family,
            variant=variant,
            config=config,
            block_kinds=("double",) * doubles + ("single",) * singles,
            states=_states(doubles, singles, self.guidance),
            constants={
                "img_ids": BlockSpan(0, doubles + singles),
                "txt_ids": BlockSpan(0, doubles + singles),
                "encoder_hidden_states": BlockSpan(0, 1),
            },
            parameters=_parameters(header, config, prefix, bfl),
            defaults=defaults,
            optional=frozenset({"guidance"}),
        )

    def _variant(self, config: Mapping[str, Any], header: CheckpointHeader) -> tuple[str, Mapping[str, Any]]:
        doubles, singles, heads = config["num_layers"], config["num_single_layers"], config["num_attention_heads"]
        for v in self.variants:
            if (v.double_blocks, v.single_blocks, v.heads) == (doubles, singles, heads):
                return v.name, v.defaults
        return f"custom {doubles}+{singles}, width {heads * config['attention_head_dim']}", self.fallback

    def skeleton(self, spec: ModelSpec) -> nn.Module:
        return _model(spec.config)

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

    def finish(self, spec: ModelSpec, state: State) -> Tensor:
        return state["sample"]

    def layouts(self, spec: ModelSpec) -> Sequence[Mapping[str, tuple[Piece, ...]]]:
        return layouts({name: p.shape for name, p in spec.parameters.items()})


def _refuse_what_cannot_cross(inputs: Mapping[str, Any]) -> None:
    refuse_attention_arguments(inputs, "joint_attention_kwargs")
    if inputs.get("kv_cache_mode") is not None:
        raise UnsupportedInput(
            "Caching the keys and values of reference images (kv_cache_mode) is not carried across a cut.",
            hint="Flux2KleinPipeline instead of its KV variant, or unsplit()",
        )


def _states(doubles: int, singles: int, guidance: bool) -> tuple[Mapping[str, Role], ...]:
    first: dict[str, Role] = {"hidden_states": "latent", "timestep": "exact"}
    if guidance:
        first["guidance"] = "exact"
    apart: dict[str, Role] = {"hidden_states": "hidden", "encoder_hidden_states": "hidden", "temb": "exact"}
    joined: dict[str, Role] = {"hidden_states": "hidden", "temb": "exact"}
    last: dict[str, Role] = {"sample": "prediction"}
    return (first, *[apart] * max(doubles - 1, 0), *[joined] * (singles if doubles else max(singles - 1, 0)), last)


def _model(config: Mapping[str, Any]) -> nn.Module:
    return diffusers_class(_MODEL_CLASS)(**config)


def _parameters(
    header: CheckpointHeader, config: Mapping[str, Any], prefix: str, bfl: bool
) -> dict[str, ParameterSpec]:
    return describe_parameters(
        header,
        skeleton=lambda: _model(config),
        pieces=lambda name, rows: pieces_of(name, rows, header.tensors, prefix, bfl),
        scope=lambda name: _scope(name, config),
    )


def _scope(name: str, config: Mapping[str, Any]) -> BlockSpan:
    doubles, blocks = config["num_layers"], config["num_layers"] + config["num_single_layers"]
    own = scope_in_stacks(name, {"transformer_blocks": 0, "single_transformer_blocks": doubles})
    if own is not None:
        return own
    kind = name.partition(".")[0]
    if kind.startswith("double_stream_modulation"):
        return BlockSpan(0, doubles)
    if kind == "single_stream_modulation":
        return BlockSpan(doubles, blocks)
    return BlockSpan(blocks - 1, blocks) if kind in ("norm_out", "proj_out") else BlockSpan(0, 1)


def _config(header: CheckpointHeader) -> dict[str, Any]:
    return full_config(diffusers_class(_MODEL_CLASS), header.config)


def _config_from_shapes(tensors: Mapping[str, TensorInfo], prefix: str, bfl: bool) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        pieces = pieces_of(name, 0, tensors, prefix, bfl)
        info = tensors.get(pieces[0].tensor)
        if info is None:
            raise CheckpointCorrupt(f"A FLUX.2 transformer without {pieces[0].tensor}.", hint="copy it again")
        return info.shape

    def count(stack: str) -> int:
        start = len(prefix) + len(stack) + 1
        indices = {n[start:].partition(".")[0] for n in tensors if n.startswith(f"{prefix}{stack}.")}
        return 1 + max((int(i) for i in indices if i.isdigit()), default=-1)

    stacks = ("double_blocks", "single_blocks") if bfl else ("transformer_blocks", "single_transformer_blocks")
    doubles, singles = count(stacks[0]), count(stacks[1])
    width, channels = shape("x_embedder.weight")
    block = "transformer_blocks.0.attn.norm_q.weight" if doubles else "single_transformer_blocks.0.attn.norm_q.weight"
    head = shape(block)[0]
    mlp = shape("single_transformer_blocks.0.attn.to_out.weight")[1] - width if singles else None
    mlp = mlp if mlp is not None else shape("transformer_blocks.0.ff.linear_out.weight")[1]
    if width % head or mlp <= 0 or head % 4:
        raise CheckpointCorrupt(
            f"The shapes of this FLUX.2 transformer do not fit each other (width {width}, head {head}, MLP {mlp}).",
            hint="copy or download it again",
        )
    guided = pieces_of("time_guidance_embed.guidance_embedder.linear_1.weight", 0, tensors, prefix, bfl)[0].tensor
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0],
        "num_layers": doubles,
        "num_single_layers": singles,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("context_embedder.weight")[1],
        "timestep_guidance_channels": shape("time_guidance_embed.timestep_embedder.linear_1.weight")[1],
        "mlp_ratio": mlp / width,
        "axes_dims_rope": (head // 4,) * 4,
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": guided in tensors,
    }
