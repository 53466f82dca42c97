"""A model that only passes its state through, to measure what is left when computing costs nothing.

A plugin module, given to the benchmark's own processes; it is not registered anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mesh_core.hookspecs import hookimpl
from mesh_core.model.adapter import ModelAdapter, Stage
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import Conditioning, ModelSpec, ParameterSpec, Piece, Role, State

_PARAMETER = "blocks.{}.weight"
_HEAD = "head.weight"
_NARROW = 128
"""Channels of a prediction, where the model ends in one: as many as packed latents have."""


class Copy(nn.Module):
    """Its output is new memory, as a block's is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, state: Tensor) -> Tensor:
        return state.clone()


class Narrow(Copy):
    """Its output is the first channels: as much smaller than the state as a prediction is."""

    def forward(self, state: Tensor) -> Tensor:
        return state[..., :_NARROW].clone()


class ThroughModel(nn.Module):
    """So many blocks that copy.

    Args:
        head: whether it ends in a prediction, not in the state.
    """

    def __init__(self, blocks: int, *, head: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Copy() for _ in range(blocks))
        self.head = Narrow() if head else None


class ThroughStage(Stage):
    """State at every cut: ``hidden_states``, of any shape and dtype; ``sample`` after a head."""

    def block_modules(self) -> Iterator[nn.Module]:
        blocks: Any = self.model.blocks
        yield from blocks[self.span.start : self.span.stop]

    def forward(self, state: State, conditioning: Conditioning) -> State:
        hidden = state["hidden_states"]
        for block in self.block_modules():
            hidden = block(hidden)
        head: Any = self.model.head
        if head is not None and self.span.stop == self.spec.blocks:
            return {"sample": head(hidden)}
        return {"hidden_states": hidden}


class ThroughAdapter(ModelAdapter):
    """Checkpoints that hold nothing but ``blocks.N.weight`` and perhaps ``head.weight``, one element each."""

    family: ClassVar[str] = "through"

    def recognise(self, header: CheckpointHeader) -> ModelSpec | None:
        head = _HEAD in header.tensors
        names = [_PARAMETER.format(i) for i in range(len(header.tensors) - head)]
        if not names or {*names, *([_HEAD] if head else [])} != header.tensors.keys():
            return None
        blocks = len(names)
        scopes = {n: BlockSpan(i, i + 1) for i, n in enumerate(names)} | (
            {_HEAD: BlockSpan(blocks - 1, blocks)} if head else {}
        )
        parameters = {n: ParameterSpec((1,), "F32", (Piece(n),), scope) for n, scope in scopes.items()}
        state: Mapping[str, Role] = {"hidden_states": "hidden"}
        last: Mapping[str, Role] = {"sample": "prediction"} if head else state
        return ModelSpec(
            family=self.family,
            variant=f"{blocks} blocks",
            config={"blocks": blocks, "head": head},
            block_kinds=("copy",) * blocks,
            states=(*(state,) * blocks, last),
            constants={},
            parameters=parameters,
        )

    def skeleton(self, spec: ModelSpec) -> nn.Module:
        return ThroughModel(spec.config["blocks"], head=spec.config["head"])

    def stage(self, spec: ModelSpec, span: BlockSpan, model: nn.Module) -> Stage:
        return ThroughStage(spec, span, model)

    def begin(self, spec: ModelSpec, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
        return {"hidden_states": inputs["hidden_states"]}, Conditioning()

    def finish(self, spec: ModelSpec, state: State) -> Tensor:
        return next(iter(state.values()))


@hookimpl
def mesh_register_adapters(register: Callable[[ModelAdapter], None]) -> None:
    """Registers the adapter of these models."""
    register(ThroughAdapter())
