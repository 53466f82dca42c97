"""The LTX adapter: recognises checkpoints of LTX-2 and LTX-2.3 and describes them to the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mesh_core.errors import CheckpointCorrupt, ConfigError
from mesh_core.model import BlockSpan, CheckpointHeader, Conditioning, ModelAdapter, ModelSpec, Piece, Role, State
from mesh_core.model.adapting import describe_parameters, diffusers_class, full_config, scope_in_stacks
from mesh_ltx.inputs import CONSTANTS, begin
from mesh_ltx.layout import config_from_metadata, find_layout, pieces_of, refuse_video_only
from mesh_ltx.stage import LtxStage

_MODEL_CLASS = "LTX2VideoTransformer3DModel"
_STATES: tuple[Mapping[str, Role], ...] = (
    {"hidden_states": "latent", "audio_hidden_states": "latent", "times": "exact"},
    {"hidden_states": "hidden", "audio_hidden_states": "fine", "times": "exact"},
    {"sample": "prediction", "audio_sample": "prediction"},
)
_OUTPUT = ("scale_shift_table", "audio_scale_shift_table", "proj_out", "audio_proj_out")
_INPUT = ("proj_in", "audio_proj_in", "keyframes_abs_pos_embedding")
_INVISIBLE = (
    "num_attention_heads",
    "audio_num_attention_heads",
    "activation_fn",
    "norm_eps",
    "patch_size",
    "patch_size_t",
    "audio_patch_size",
    "audio_patch_size_t",
    "vae_scale_factors",
    "pos_embed_max_pos",
    "base_height",
    "base_width",
    "audio_pos_embed_max_pos",
    "audio_scale_factor",
    "audio_sampling_rate",
    "audio_hop_length",
    "causal_offset",
    "rope_type",
    "rope_theta",
    "rope_double_precision",
    "timestep_scale_multiplier",
    "cross_attn_timestep_scale_multiplier",
)

TEMPORAL, SPATIAL = 8, 32
"""Frames per latent frame after the first, and pixels per latent, along each side, of the published video codecs."""


class LtxAdapter(ModelAdapter):
    """LTX-2 (19B) and LTX-2.3 (22B): a video and an audio stream, which attend to each other in every block."""

    family: ClassVar[str] = "ltx"
    hosts: ClassVar[Mapping[str, str]] = {"comfy": "mesh_ltx.comfy:LtxComfy"}

    def recognise(self, header: CheckpointHeader) -> ModelSpec | None:
        found = find_layout(header.tensors)
        named = header.config.get("_class_name")
        if found is None or named not in (None, _MODEL_CLASS):
            refuse_video_only(header)
            return None
        prefix, original = found
        config = _config(header, prefix)
        blocks = config["num_layers"]
        whole = BlockSpan(0, blocks)
        return ModelSpec(
            family=self.family,
            variant=_variant(config),
            config=config,
            block_kinds=("audio-video",) * blocks,
            states=(_STATES[0], *[_STATES[1]] * (blocks - 1), _STATES[2]),
            constants={name: BlockSpan(0, 1) if name == "video_keyframes_mask" else whole for name in CONSTANTS},
            parameters=describe_parameters(
                header,
                skeleton=lambda: _model(config),
                pieces=lambda name, _: pieces_of(name, prefix, original),
                scope=lambda name: _scope(name, blocks),
            ),
            defaults=_defaults(config),
            optional=frozenset(name for name, needed in CONSTANTS.items() if not needed),
            invisible={name: _plain(config[name]) for name in _INVISIBLE},
        )

    def skeleton(self, spec: ModelSpec) -> nn.Module:
        return _model(spec.config)

    def stage(self, spec: ModelSpec, span: BlockSpan, model: nn.Module) -> LtxStage:
        return LtxStage(spec, span, model)

    def begin(self, spec: ModelSpec, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
        return begin(spec, inputs)

    def finish(self, spec: ModelSpec, state: State) -> tuple[Tensor, ...]:
        return state["sample"], state["audio_sample"]

    def output(self, result: Tensor | tuple[Tensor, ...]) -> Any:
        from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput

        return AudioVisualModelOutput(*result)

    def check_call(self, spec: ModelSpec, header: CheckpointHeader, arguments: Mapping[str, Any]) -> None:
        frames = arguments.get("num_frames")
        if frames is not None and (frames < 1 or (frames - 1) % TEMPORAL):
            below = max(frames - 1, 0) // TEMPORAL * TEMPORAL + 1
            raise ConfigError(
                f"LTX-2 makes {TEMPORAL}n + 1 frames; {frames} is none of these.", hint=f"{below} or {below + TEMPORAL}"
            )
        for side in ("width", "height"):
            pixels = arguments.get(side)
            if pixels is not None and (pixels < SPATIAL or pixels % SPATIAL):
                raise ConfigError(
                    f"LTX-2 needs a {side} that {SPATIAL} divides; {pixels} is none.",
                    hint=f"{max(round(pixels / SPATIAL), 1) * SPATIAL}",
                )

    def layouts(self, spec: ModelSpec) -> Sequence[Mapping[str, tuple[Piece, ...]]]:
        """LoRAs name parameters as diffusers does, or as Lightricks does."""
        return ({name: pieces_of(name, "", original=True) for name in spec.parameters},)


def _config(header: CheckpointHeader, prefix: str) -> dict[str, Any]:
    given = header.config or config_from_metadata(header, prefix)
    config = full_config(diffusers_class(_MODEL_CLASS), given)
    sizes = ("num_layers", "num_attention_heads", "attention_head_dim", "audio_num_attention_heads")
    for name in sizes:
        if not isinstance(config[name], int) or not 0 < config[name] <= 1 << 16:
            raise CheckpointCorrupt(f"{header.path} says {name}={config[name]!r}.", hint="copy or download it again")
    return config


def _plain(value: Any) -> Any:
    """Equal for equal meaning: files write 1000 and 1000.0, lists and tuples."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, (int, float)) else value


def _variant(config: Mapping[str, Any]) -> str:
    generation = "2.3" if config["cross_attn_mod"] or config["gated_attn"] else "2.0"
    width = config["num_attention_heads"] * config["attention_head_dim"]
    audio = config["audio_num_attention_heads"] * config["audio_attention_head_dim"]
    if (config["num_layers"], width, audio) == (48, 4096, 2048):
        return f"ltx-{generation}"
    return f"custom ltx-{generation}, {config['num_layers']} blocks, width {width}+{audio}"


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the authors recommend; everything else is what the pipeline's call has as its own default."""
    newer = bool(config["cross_attn_mod"])
    perturbed = min(28 if newer else 29, config["num_layers"] - 1)
    return {"use_cross_timestep": newer, "spatio_temporal_guidance_blocks": [perturbed]}


def _model(config: Mapping[str, Any]) -> nn.Module:
    return diffusers_class(_MODEL_CLASS)(**config)


def _scope(name: str, blocks: int) -> BlockSpan:
    own = scope_in_stacks(name, {"transformer_blocks": 0})
    if own is not None:
        return own
    top = name.partition(".")[0]
    if top in _OUTPUT:
        return BlockSpan(blocks - 1, blocks)
    return BlockSpan(0, 1) if top in _INPUT else BlockSpan(0, blocks)
