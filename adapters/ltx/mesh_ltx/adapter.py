"""The LTX adapter: recognises checkpoints of LTX-2 and LTX-2.3 and describes them to the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mesh_core.errors import ConfigError
from mesh_core.model import (
    BlockSpan,
    CheckpointHeader,
    Conditioning,
    Dimensions,
    ModelAdapter,
    ModelSpec,
    Piece,
    Role,
    State,
)
from mesh_core.model.adapting import describe_parameters, invisible_arguments, scope_in_stacks
from mesh_ltx.config import INVISIBLE, MODEL_CLASS, config_of, make_model
from mesh_ltx.inputs import CONSTANTS, begin
from mesh_ltx.layout import find_layout, pieces_of, refuse_video_only
from mesh_ltx.stage import LtxStage

_STATES: tuple[Mapping[str, Role], ...] = (
    {"hidden_states": "latent", "audio_hidden_states": "latent", "times": "exact"},
    {"hidden_states": "hidden", "audio_hidden_states": "fine", "times": "exact"},
    {"sample": "prediction", "audio_sample": "prediction"},
)
_OUTPUT = ("scale_shift_table", "audio_scale_shift_table", "proj_out", "audio_proj_out")
_INPUT = ("proj_in", "audio_proj_in", "keyframes_abs_pos_embedding")

TEMPORAL, SPATIAL = 8, 32
"""Frames per latent frame after the first, and pixels per latent, along each side, of the published video codecs."""


class LtxAdapter(ModelAdapter):
    """LTX-2 (19B) and LTX-2.3 (22B): a video and an audio stream, which attend to each other in every block."""

    family: ClassVar[str] = "ltx"
    hosts: ClassVar[Mapping[str, str]] = {"comfy": "mesh_ltx.comfy:LtxComfy"}

    def recognise(self, header: CheckpointHeader) -> ModelSpec | None:
        found = find_layout(header.tensors)
        named = header.config.get("_class_name")
        if found is None or named not in (None, MODEL_CLASS):
            refuse_video_only(header)
            return None
        prefix, original = found
        config = config_of(header, prefix)
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
                skeleton=lambda: make_model(config),
                pieces=lambda name, _: pieces_of(name, prefix, original),
                scope=lambda name: _scope(name, blocks),
            ),
            defaults=_defaults(config),
            optional=frozenset(name for name, needed in CONSTANTS.items() if not needed),
            invisible=invisible_arguments(config, INVISIBLE),
        )

    def skeleton(self, spec: ModelSpec) -> nn.Module:
        return make_model(spec.config)

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
                f"LTX-2 makes {TEMPORAL}n + 1 frames; {frames} is not.",
                hint=f"{below} or {below + TEMPORAL}",
            )
        for side in ("width", "height"):
            pixels = arguments.get(side)
            if pixels is not None and (pixels < SPATIAL or pixels % SPATIAL):
                raise ConfigError(
                    f"LTX-2 needs a {side} that {SPATIAL} divides; it does not divide {pixels}.",
                    hint=f"{max(round(pixels / SPATIAL), 1) * SPATIAL}",
                )

    def shapes(self, spec: ModelSpec, cut: int) -> Mapping[str, Dimensions]:
        config = spec.config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        audio_width = config["audio_num_attention_heads"] * config["audio_attention_head_dim"]
        return {
            "hidden_states": ("batch", "video", width if cut else config["in_channels"]),
            "audio_hidden_states": ("batch", "audio", audio_width if cut else config["audio_in_channels"]),
            "times": ("times",),
            "encoder_hidden_states": ("batch", "text", "text width"),
            "audio_encoder_hidden_states": ("batch", "audio text", "audio text width"),
            "video_coords": ("batch", 3, "video", 2),
            "audio_coords": ("batch", 1, "audio", 2),
            "video_keyframes_mask": ("batch", "video", 1),
            "sample": ("batch", "video", spec.parameters["proj_out.weight"].shape[0]),
            "audio_sample": ("batch", "audio", spec.parameters["audio_proj_out.weight"].shape[0]),
        }

    def layouts(self, spec: ModelSpec) -> Sequence[Mapping[str, tuple[Piece, ...]]]:
        """LoRAs name parameters as diffusers does, or as Lightricks does."""
        return ({name: pieces_of(name, "", original=True) for name in spec.parameters},)


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


def _scope(name: str, blocks: int) -> BlockSpan:
    own = scope_in_stacks(name, {"transformer_blocks": 0})
    if own is not None:
        return own
    top = name.partition(".")[0]
    if top in _OUTPUT:
        return BlockSpan(blocks - 1, blocks)
    return BlockSpan(0, 1) if top in _INPUT else BlockSpan(0, blocks)
