"""The contract between the core and a model family. The core knows models only through these types.

An adapter says what a checkpoint is (`ModelSpec`), gives the family's own model class as a skeleton without
weights, and writes the glue between its blocks (`Stage`). Reading weights, sharing them, hashing them, sending
state and conditioning: all of that is the core's, and follows from the facts in `ModelSpec`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mesh_core.spans import BlockSpan

if TYPE_CHECKING:
    from mesh_core.checkpoint import CheckpointHeader
    from mesh_core.weights import WeightReader

State = dict[str, Tensor]
"""The tensors that change from block to block and cross a cut, by name."""

Role = Literal["hidden", "fine", "latent", "prediction", "exact"]
"""What a state tensor is, for whoever chooses its codec.

``hidden``: residual stream, large, may be coded with loss. ``fine``: another one, of few bytes beside it, which is
coded with a codec of its own and never with more loss than quality ``transparent`` has: a sound beside a video.
``latent``: the model's input. ``prediction``: its output. ``exact``: small, never coded with loss.
"""


@dataclass(frozen=True)
class Piece:
    """Rows ``start:stop`` (along dimension 0) of a tensor in a checkpoint file; the whole tensor if stop is None."""

    tensor: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class ParameterSpec:
    """Where one parameter of the model comes from, and which blocks need it.

    Attributes:
        shape: of the parameter in the model.
        dtype: in the file, as safetensors names it (``"BF16"``, ``"F32"``, ``"F16"``).
        pieces: rows of file tensors, concatenated along dimension 0, that make the parameter.
        scope: the blocks that need the parameter. A block's own parameters: that block. Input layers: ``0:1``.
            Output layers: the last block. Shared modulation: all blocks that use it.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    scope: BlockSpan

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelSpec:
    """Everything the core needs to know of one checkpoint, found from its header alone.

    Attributes:
        family: of the adapter that recognised it.
        variant: for people, for example ``"9b"``.
        config: the arguments of the model class; plain data.
        block_kinds: one word per block in execution order (``"double"``, ``"single"``); their number is N.
        states: N + 1 mappings: names and roles of the state at cut 0 (the model's input) to cut N (its output).
        constants: names of the tensors that are constant for a generation, and the blocks that need them.
        parameters: every parameter of the model by its name in the model class. Names are those of diffusers,
            whatever the file calls them, so two layouts of the same weights are the same model.
        defaults: arguments of the pipeline's call that the model's authors recommend.
        optional: names of state tensors and constants that may be missing, as an argument of forward() may be.
        invisible: arguments of the model class that change what it computes and show in no parameter's name or shape
            (a base of rotary frequencies, a number of heads); plain data. Part of the model's identity.
    """

    family: str
    variant: str
    config: Mapping[str, Any]
    block_kinds: tuple[str, ...]
    states: tuple[Mapping[str, Role], ...]
    constants: Mapping[str, BlockSpan]
    parameters: Mapping[str, ParameterSpec]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    invisible: Mapping[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """N, the number of blocks."""
        return len(self.block_kinds)

    def span(self, text: str) -> BlockSpan:
        """``text`` as a span of this model; see `BlockSpan.parse`."""
        return BlockSpan.parse(text, self.blocks)

    def parameters_of(self, span: BlockSpan) -> dict[str, ParameterSpec]:
        """The parameters that a stage of ``span`` needs; none for an empty span."""
        return {name: p for name, p in self.parameters.items() if p.scope.overlaps(span)}

    def constants_of(self, span: BlockSpan) -> tuple[str, ...]:
        """Names of the generation constants that a stage of ``span`` needs."""
        return tuple(name for name, scope in self.constants.items() if scope.overlaps(span))

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that occur among the parameters, as safetensors names them, sorted."""
        return tuple(sorted({p.dtype for p in self.parameters.values()}))


@dataclass
class Conditioning:
    """What blocks need besides the state.

    Attributes:
        constants: constant for a generation (ids, masks, text). Each crosses once, named by the hash of its
            whole content.
        options: small plain values (None, bool, int, float, str, or lists of them) that change how blocks compute.
            They cross with every step; a stage must not trust them, since they come over the network.
    """

    constants: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Stage(nn.Module, ABC):
    """A span of blocks on a device.

    ``model`` is an instance of the family's model class. Only the parameters that the span needs hold data; the
    others stay on the meta device, so names and structure are complete.
    """

    span: BlockSpan
    model: nn.Module

    def __init__(self, spec: ModelSpec, span: BlockSpan, model: nn.Module) -> None:
        super().__init__()
        self.spec, self.span, self.model = spec, span, model

    @abstractmethod
    def forward(self, state: State, conditioning: Conditioning) -> State:
        """Run the span: the state at cut ``span.start`` in, the state at cut ``span.stop`` out.

        Must give, composed over any cuts, bit for bit what the model class's own forward gives on the same device
        and dtype. Must not change its inputs in place.
        """

    @abstractmethod
    def block_modules(self) -> Iterator[nn.Module]:
        """The modules of the span's blocks in execution order; the core hooks them to cancel and to measure."""


class ModelAdapter(ABC):
    """A model family. Stateless; one instance is registered through ``mesh_register_adapters``."""

    family: ClassVar[str]
    hosts: ClassVar[Mapping[str, str]] = {}
    """Host programs that have blocks of their own: name -> ``"module:class"`` of this family's side there, imported
    only inside that program. For ``"comfy"`` the class is a `mesh_core.hosts.comfy.ComfySide`."""

    @abstractmethod
    def recognise(self, header: CheckpointHeader) -> ModelSpec | None:
        """The spec of a checkpoint of this family; None if it is another's.

        Looks at names, shapes, metadata and config only; reads no tensor data.

        Raises:
            CheckpointError: the checkpoint is of this family but cannot be used; says why.
        """

    @abstractmethod
    def skeleton(self, spec: ModelSpec) -> nn.Module:
        """The family's model with all parameters of ``spec``; called on the meta device."""

    @abstractmethod
    def stage(self, spec: ModelSpec, span: BlockSpan, model: nn.Module) -> Stage:
        """A stage of ``span`` over ``model``, which holds at least the span's parameters."""

    @abstractmethod
    def begin(self, spec: ModelSpec, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
        """The model class's forward() arguments, by name, as the state at cut 0 and the conditioning.

        Raises:
            UnsupportedInput: an argument that this adapter cannot carry across a cut; named, never dropped.
        """

    @abstractmethod
    def finish(self, spec: ModelSpec, state: State) -> Tensor | tuple[Tensor, ...]:
        """The state at cut N as the tensors that the model class's forward returns."""

    def check_call(self, spec: ModelSpec, header: CheckpointHeader, arguments: Mapping[str, Any]) -> None:  # noqa: B027
        """Refuse arguments of the pipeline's call that this model cannot do; called before any weight is read.

        Args:
            arguments: those that the user set, by their names in the pipeline's call.

        Raises:
            ConfigError: names the argument, and values that are accepted.
        """

    def output(self, result: Tensor | tuple[Tensor, ...]) -> Any:
        """What `finish` gives, in the type that the model class returns for ``return_dict=True``."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=result)

    def build_stage(
        self,
        spec: ModelSpec,
        span: BlockSpan,
        weights: WeightReader,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Stage:
        """A stage of ``span`` with its weights read from ``weights`` and nothing else read.

        Raises:
            CheckpointError: a tensor is missing or damaged.
        """
        with torch.device("meta"):
            model = self.skeleton(spec).eval().requires_grad_(False)
        weights.fill(model, spec.parameters_of(span), device=torch.device(device), dtype=dtype)
        return self.stage(spec, span, model).eval()

    def layouts(self, spec: ModelSpec) -> Sequence[Mapping[str, tuple[Piece, ...]]]:
        """Other namings of the family's parameters that files for it use, LoRAs above all.

        Each maps parameter names to the tensors, or rows of tensors, that hold them there. A LoRA that names such a
        tensor is applied to the parameters' rows. The names of the parameters themselves, those of the checkpoint,
        and the prefixes and joined forms that are common to all families need not be told. One layout may cover a
        part of the parameters. The default has none.
        """
        return ()
