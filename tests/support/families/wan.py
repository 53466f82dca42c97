"""Wan: modules that its class keeps in float32, and two buffers of rotary frequencies that no checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from mesh_core.model import BlockSpan, CheckpointHeader, Conditioning, ModelAdapter, ModelSpec, Piece, Stage, State
from mesh_core.model.adapting import describe_parameters, full_config, scope_in_stacks

_BETWEEN = {"hidden_states": "hidden", "temb": "exact", "timestep_proj": "exact"}
_MADE_OF = "latents"


class WanStage(Stage):
    """At 0: ``hidden_states`` [B, C, F, H, W], ``timestep`` [B]. Between: ``hidden_states`` [B, S, D], ``temb`` [B, D],
    ``timestep_proj`` [B, 6, D]. At N: ``sample`` [B, C, F, H, W]. Constants: text; ``latents``, for their shape."""

    def block_modules(self) -> Iterator[nn.Module]:
        blocks: Any = self.model.blocks
        yield from blocks[self.span.start : self.span.stop]

    def forward(self, state: State, conditioning: Conditioning) -> State:
        if not len(self.span):
            return state
        model, constants = self.model, conditioning.constants
        assert isinstance(model, WanTransformer3DModel)
        latents = constants[_MADE_OF]
        rotary, text = model.rope(latents), constants["encoder_hidden_states"]
        if self.span.start == 0:
            hidden = model.patch_embedding(state["hidden_states"]).flatten(2).transpose(1, 2).contiguous()
            temb, projected, text, _ = model.condition_embedder(state["timestep"], text, None, timestep_seq_len=None)
            projected = projected.unflatten(1, (6, -1))
        else:
            hidden, temb, projected = state["hidden_states"], state["temb"], state["timestep_proj"]
            text = model.condition_embedder.text_embedder(text)
        for block in self.block_modules():
            hidden = block(hidden, text, projected, rotary)
        if self.span.stop < self.spec.blocks:
            return {"hidden_states": hidden, "temb": temb, "timestep_proj": projected}
        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden = model.proj_out((model.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden))
        sizes = [s // p for s, p in zip(latents.shape[2:], model.config.patch_size, strict=True)]
        hidden = hidden.reshape(latents.shape[0], *sizes, *model.config.patch_size, -1)
        return {"sample": hidden.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)}


class WanAdapter(ModelAdapter):
    """Text to video."""

    family: ClassVar[str] = "test-wan"

    def recognise(self, header: CheckpointHeader) -> ModelSpec | None:
        if header.config.get("_class_name") != "WanTransformer3DModel":
            return None
        config = full_config(WanTransformer3DModel, header.config)
        blocks = config["num_layers"]

        def scope(name: str) -> BlockSpan:
            own = scope_in_stacks(name, {"blocks": 0})
            if own is not None:
                return own
            if "text_embedder" in name:
                return BlockSpan(0, blocks)
            return BlockSpan(blocks - 1, blocks) if name.startswith(("proj_out", "scale_shift")) else BlockSpan(0, 1)

        return ModelSpec(
            family=self.family,
            variant="test",
            config=config,
            block_kinds=("block",) * blocks,
            states=(  # type: ignore[arg-type]
                {"hidden_states": "latent", "timestep": "exact"},
                *[_BETWEEN] * (blocks - 1),
                {"sample": "prediction"},
            ),
            constants={"encoder_hidden_states": BlockSpan(0, blocks), _MADE_OF: BlockSpan(0, blocks)},
            parameters=describe_parameters(
                header, lambda: WanTransformer3DModel(**config), lambda name, rows: (Piece(name),), scope
            ),
        )

    def skeleton(self, spec: ModelSpec) -> nn.Module:
        return WanTransformer3DModel(**spec.config)

    def stage(self, spec: ModelSpec, span: BlockSpan, model: nn.Module) -> Stage:
        return WanStage(spec, span, model)

    def begin(self, spec: ModelSpec, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
        state = {name: inputs[name] for name in ("hidden_states", "timestep")}
        shape = torch.zeros_like(inputs["hidden_states"])
        return state, Conditioning({"encoder_hidden_states": inputs["encoder_hidden_states"], _MADE_OF: shape})

    def finish(self, spec: ModelSpec, state: State) -> Tensor:
        return state["sample"]


def save(folder: Path, *, blocks: int = 3, dtype: torch.dtype = torch.float32) -> Path:
    """A model of width 24 on disk, all of it in ``dtype``."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=blocks,
        rope_max_seq_len=32,
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    nn.Module.to(model, dtype).save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of forward()."""
    random = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, 2, 4, 4, generator=random).to(dtype),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=random).to(dtype),
    }
