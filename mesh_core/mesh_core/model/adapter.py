"""The contract between the core and a model family. The core knows models only through these types.

An adapter says what a checkpoint is (`ModelSpec`), gives the family's own model class as a skeleton without
weights, and writes the glue between its blocks (`Stage`). Reading weights, sharing them, hashing them, sending
state and conditioning: all of that is the core's, and follows from the facts in `ModelSpec`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mesh_core.model.attention import use_backend
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.constructing import without_weights
from mesh_core.model.numerics import Numerics
from mesh_core.model.shapes import Dimensions
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import Conditioning, ModelSpec, Piece, State
from mesh_core.model.tensors import move_computed_buffers
from mesh_core.model.weights import WeightReader


class Stage(nn.Module, ABC):
    """A span of blocks on a device.

    ``model`` is an instance of the family's model class. Only the parameters that the span needs hold data; the
    others stay on the meta device, so names and structure are complete. What the class computes itself is there:
    buffers on the stage's device, plain attributes where the class made them, on the CPU, as ``Model.to`` leaves them.
    """

    span: BlockSpan
    model: nn.Module
    _attention: object = None

    def __init__(self, spec: ModelSpec, span: BlockSpan, model: nn.Module) -> None:
        super().__init__()
        self.spec, self.span, self.model = spec, span, model

    def attend_with(self, backend: object) -> None:
        """Compute attention with one of diffusers' backends, by name, from now on; None: with that of this process.

        Raises:
            UnsupportedInput: it cannot be used on this machine.
        """
        if backend != self._attention:
            use_backend(self.model, backend)
            self._attention = backend

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
    only inside that program. For ``"comfy"`` the class is a `mesh_core.programs.comfy.ComfySide`."""

    @abstractmethod
    def recognise(self, header: CheckpointHeader) -> ModelSpec | None:
        """The spec of a checkpoint of this family; None if it is another's.

        Looks at names, shapes, metadata and config only; reads no tensor data.

        Raises:
            CheckpointError: the checkpoint is of this family but cannot be used; says why.
        """

    @abstractmethod
    def skeleton(self, spec: ModelSpec) -> nn.Module:
        """The family's model with all parameters of ``spec``; called on the meta device, and where its class computes
        tensors that are no parameters, once more for them."""

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

    def shapes(self, spec: ModelSpec, cut: int) -> Mapping[str, Dimensions]:
        """Shapes of the state at ``cut``, and of the constants that a stage which starts there needs.

        A worker refuses a step whose tensors have others, before it decodes them, and estimates from them what the step
        will take; a host refuses results of others. Without this, tensors that do not fit each other may be repeated to
        an enormous size by the model. Tensors that are left out are not checked; the default has none.
        """
        return {}

    def check_call(self, spec: ModelSpec, header: CheckpointHeader, arguments: Mapping[str, Any]) -> None:  # noqa: B027
        """Refuse arguments of the pipeline's call that this model cannot do; called before any weight is read.

        Args:
            arguments: those that the user set, by their names in the pipeline's call.

        Raises:
            ConfigError: names the argument, and values that are accepted.
        """

    def recommended(self, spec: ModelSpec, header: CheckpointHeader) -> Mapping[str, Any]:
        """Arguments of the pipeline's call that the model's authors recommend, and that its folder says.

        Raises:
            CheckpointError: a file of the folder is damaged.
        """
        return spec.defaults

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
        numerics: Numerics,
    ) -> Stage:
        """A stage of ``span`` with its weights read from ``weights`` and nothing else read.

        Raises:
            CheckpointError: a tensor is missing or damaged, or the model has what a stage cannot carry.
            CheckpointMismatch: its class computes other tensors here than ``numerics`` says.
        """
        model = without_weights(lambda: self.skeleton(spec), numerics.dtype, numerics.computed)
        model = model.eval().requires_grad_(False)
        weights.fill(model, spec.parameters_of(span), device=torch.device(device), numerics=numerics)
        move_computed_buffers(model, torch.device(device))
        return self.stage(spec, span, model).eval()

    def layouts(self, spec: ModelSpec) -> Sequence[Mapping[str, tuple[Piece, ...]]]:
        """Other namings of the family's parameters that files for it use, LoRAs above all.

        Each maps parameter names to the tensors, or rows of tensors, that hold them there. A LoRA that names such a
        tensor is applied to the parameters' rows. The names of the parameters themselves, those of the checkpoint,
        and the prefixes and joined forms that are common to all families need not be among them. One layout may cover a
        part of the parameters. The default has none.
        """
        return ()
