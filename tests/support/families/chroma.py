"""Chroma: its class computes a table (``mod_proj``) that all blocks are modulated from, and no checkpoint holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor, nn

from mesh_core.model import BlockSpan, CheckpointHeader, Conditioning, ModelAdapter, ModelSpec, Piece, Stage, State
from mesh_core.model.adapting import describe_parameters, full_config, scope_in_stacks

_CONSTANT = ("img_ids", "txt_ids")


class ChromaStage(Stage):
    """At 0: ``hidden_states`` [B, S, C], ``encoder_hidden_states`` [B, T, J], ``timestep`` [B]. Between: both of width
    D, joined after the double blocks [B, T + S, D]. At N: ``sample``. ``timestep`` crosses all cuts: each stage makes
    its modulation of it."""

    def block_modules(self) -> Iterator[nn.Module]:
        doubles: Any = self.model.transformer_blocks
        singles: Any = self.model.single_transformer_blocks
        yield from [*doubles, *singles][self.span.start : self.span.stop]

    def forward(self, state: State, conditioning: Conditioning) -> State:
        if not len(self.span):
            return state
        model, ids = self.model, conditioning.constants
        assert isinstance(model, ChromaTransformer2DModel)
        doubles, singles = len(model.transformer_blocks), len(model.single_transformer_blocks)
        rotary = model.pos_embed(torch.cat((ids["txt_ids"], ids["img_ids"]), dim=0))
        hidden, text, timestep = state["hidden_states"], state.get("encoder_hidden_states"), state["timestep"]
        modulation = model.distilled_guidance_layer(model.time_text_embed(timestep.to(model.dtype) * 1000))
        if self.span.start == 0:
            hidden, text = model.x_embedder(hidden), model.context_embedder(text)
        for index, block in enumerate(self.block_modules(), self.span.start):
            if index < doubles:
                image_at = 3 * singles + 6 * index
                text_at = image_at + 6 * doubles
                temb = torch.cat((modulation[:, image_at : image_at + 6], modulation[:, text_at : text_at + 6]), dim=1)
                text, hidden = block(
                    hidden_states=hidden, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary
                )
            else:
                at = 3 * (index - doubles)
                hidden = hidden if text is None else torch.cat([text, hidden], dim=1)
                text = None
                hidden = block(hidden_states=hidden, temb=modulation[:, at : at + 3], image_rotary_emb=rotary)
        if self.span.stop < self.spec.blocks:
            between = {"hidden_states": hidden, "timestep": timestep}
            return between if text is None else {**between, "encoder_hidden_states": text}
        hidden = hidden[:, len(ids["txt_ids"]) :, ...]
        return {"sample": model.proj_out(model.norm_out(hidden, modulation[:, -2:]))}


class ChromaAdapter(ModelAdapter):
    """Text to image, without masks."""

    family: ClassVar[str] = "test-chroma"

    def recognise(self, header: CheckpointHeader) -> ModelSpec | None:
        if header.config.get("_class_name") != "ChromaTransformer2DModel":
            return None
        config = full_config(ChromaTransformer2DModel, header.config)
        doubles, singles = config["num_layers"], config["num_single_layers"]
        blocks = doubles + singles

        def scope(name: str) -> BlockSpan:
            own = scope_in_stacks(name, {"transformer_blocks": 0, "single_transformer_blocks": doubles})
            if own is not None:
                return own
            if name.startswith("distilled"):
                return BlockSpan(0, blocks)
            return BlockSpan(blocks - 1, blocks) if name.startswith(("proj_out", "norm_out")) else BlockSpan(0, 1)

        apart = {"hidden_states": "hidden", "encoder_hidden_states": "hidden", "timestep": "exact"}
        joined = {"hidden_states": "hidden", "timestep": "exact"}
        return ModelSpec(
            family=self.family,
            variant="test",
            config=config,
            block_kinds=("double",) * doubles + ("single",) * singles,
            states=(  # type: ignore[arg-type]
                {"hidden_states": "latent", "encoder_hidden_states": "exact", "timestep": "exact"},
                *[apart] * doubles,
                *[joined] * (singles - 1),
                {"sample": "prediction"},
            ),
            constants=dict.fromkeys(_CONSTANT, BlockSpan(0, blocks)),
            parameters=describe_parameters(
                header, lambda: ChromaTransformer2DModel(**config), lambda name, rows: (Piece(name),), scope
            ),
        )

    def skeleton(self, spec: ModelSpec) -> nn.Module:
        return ChromaTransformer2DModel(**spec.config)

    def stage(self, spec: ModelSpec, span: BlockSpan, model: nn.Module) -> Stage:
        return ChromaStage(spec, span, model)

    def begin(self, spec: ModelSpec, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
        state = {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")}
        return state, Conditioning({name: inputs[name] for name in _CONSTANT})

    def finish(self, spec: ModelSpec, state: State) -> Tensor:
        return state["sample"]


def save(
    folder: Path, model_class: type[Any] = ChromaTransformer2DModel, *, dtype: torch.dtype = torch.float32
) -> Path:
    """A model of 2 + 2 blocks and width 32 on disk."""
    torch.manual_seed(0)
    model = ChromaTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    model.to(dtype).save_pretrained(folder)
    return folder


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of forward()."""
    random = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 6, 4, generator=random).to(dtype),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=random).to(dtype),
        "timestep": torch.tensor([0.7]).to(dtype),
        "img_ids": torch.randint(4, (6, 3), generator=random).float(),
        "txt_ids": torch.zeros(5, 3),
    }
