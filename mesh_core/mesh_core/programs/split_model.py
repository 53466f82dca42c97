"""What a split transformer does differently from the diffusers model that it is.

The model object stays; its class becomes a subclass of its own class with `SplitModel` in front. Parameters of
remote blocks stay where they are (on the meta device, or parked on the CPU) whatever the pipeline is moved to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mesh_core.errors import UnsupportedInput
from mesh_core.host.runner import SplitRunner
from mesh_core.model.attention import OPTION, attention_layers, backend_in_use
from mesh_core.model.numerics import Numerics
from mesh_core.model.tensors import stored_tensors
from mesh_core.programs.foreign_parts import mark, unmark
from mesh_core.programs.model_calls import ModelCalls
from mesh_core.programs.peft import PeftLoras
from mesh_core.programs.peft_calls import LoraCalls
from mesh_core.programs.replaced_parts import redirect_forward

_NOT_AS_ONE_GRAPH = "a split transformer: pipe.transformer.compile() compiles the blocks that run here"


class SplitModel(LoraCalls, ModelCalls):
    """Mixed into a transformer's class by `attach`. ``mesh`` runs the plan."""

    mesh: SplitRunner
    _mesh_device: torch.device
    _mesh_numerics: Numerics
    _mesh_sequence: str
    _mesh_attention: list[nn.Module]

    @torch.compiler.disable(reason=_NOT_AS_ONE_GRAPH)  # type: ignore[no-untyped-call, untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, SplitModel):
            # Hooks that were put on while it was split still call this.
            return type(self).forward(self, *args, **kwargs)
        self._mesh_settle_loras()
        inputs = inspect.signature(inspect.unwrap(own_class(self).forward)).bind(self, *args, **kwargs).arguments
        inputs.pop("self")
        return_dict = inputs.pop("return_dict", True)
        backend = backend_in_use(self._mesh_attention)
        output = self.mesh(inputs, self._mesh_sequence, {OPTION: backend})
        if return_dict:
            return self.mesh.checkpoint.adapter.output(output)
        return output if isinstance(output, tuple) else (output,)

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Diffusers' name for one of several interleaved runs (``cond``, ``uncond``)."""
        with cast(Any, super()).cache_context(name, **kwargs):
            previous, self._mesh_sequence = self._mesh_sequence, name
            try:
                yield
            finally:
                self._mesh_sequence = previous

    @property
    def device(self) -> torch.device:
        """Where the local blocks are, and where the pipeline is to put the inputs."""
        return self._mesh_device

    @property
    def dtype(self) -> torch.dtype:
        """In which all machines compute."""
        return self._mesh_numerics.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(torch.empty(0, device=self.device, dtype=self.dtype))
        self.refuse_type(moved.dtype)
        held, local = stored_tensors(self), self._local_names()
        # Others may be of other types, and `to(dtype)` would cast those.
        for dtype in {t.dtype for t in (*held.values(), *self.buffers())}:
            if fn(torch.empty(0, dtype=dtype)).dtype != dtype:
                raise UnsupportedInput(
                    f"This model holds {dtype} beside {self.dtype} on all machines; that cannot be cast here alone.",
                    hint="to(device) without a type; type(pipe)(**pipe.components) for another pipeline; or unsplit()",
                )
        others = {id(tensor) for name, tensor in held.items() if name not in local}
        cast(Any, super())._apply(lambda t: t if t.is_meta or id(t) in others else fn(t), recurse)
        self._mesh_device = moved.device
        if self.mesh.session is not None:
            self.mesh.session.options = replace(self.mesh.session.options, device=moved.device)
        return self

    def refuse_type(self, dtype: torch.dtype) -> None:
        """Refuse to compute in another type than workers do: UnsupportedInput."""
        if dtype != self.dtype:
            raise UnsupportedInput(
                f"A split model computes in {self.dtype} on all machines; it cannot become {dtype} here alone.",
                hint=f"load_pipeline(..., dtype={dtype}), or from_pipe(..., dtype={self.dtype})",
            )

    def _local_names(self) -> set[str]:
        return set(self.mesh.checkpoint.spec.parameters_of(self.mesh.plan.local))


class SplitKind(type):
    """The class of a split model: equal to the model's own, which diffusers' ``from_pipe`` looks for with ``==``."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__bases__[1]

    def __hash__(cls) -> int:
        return hash(cls.__bases__[1])


def attach(
    model: nn.Module,
    runner: SplitRunner,
    device: torch.device,
    numerics: Numerics,
    loras: PeftLoras | None = None,
) -> None:
    """Make ``model`` run ``runner``; also when it is split already."""
    own = own_class(model)
    redirect_forward(model, own.forward, SplitModel.forward)
    model.__class__ = cast(Any, SplitKind(own.__name__, (SplitModel, own), {"__module__": own.__module__}))
    split = cast(SplitModel, model)
    split.mesh = runner
    split._mesh_device, split._mesh_numerics = device, numerics
    split._mesh_sequence = ""
    # Compiled as one graph it would be the whole model's; blocks that run here can be compiled.
    vars(split).setdefault("_mesh_compiled", split._compiled_call_impl)
    split._compiled_call_impl = None
    split._mesh_loras = loras or PeftLoras(runner.checkpoint)
    split._mesh_attention = attention_layers(model)
    mark(model, runner.checkpoint.spec, runner.plan.local)


def detach(model: nn.Module) -> None:
    """Make ``model`` an ordinary model again."""
    own = own_class(model)
    unmark(model)
    model.__class__ = own
    redirect_forward(model, SplitModel.forward, own.forward)
    model._compiled_call_impl = vars(model).pop("_mesh_compiled")
    for name in ("mesh", "_mesh_device", "_mesh_numerics", "_mesh_sequence", "_mesh_attention", "_mesh_loras"):
        model.__dict__.pop(name, None)


def model_of(pipeline: Any) -> Any:
    """The transformer of a pipeline, also behind what torch.compile() made of it; None where there is none."""
    model = getattr(pipeline, "transformer", None)
    return getattr(model, "_orig_mod", model)


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class of diffusers that a model, split or not, is of."""
    cls = type(model)
    return cast("type[nn.Module]", cls.__bases__[1]) if issubclass(cls, SplitModel) else cls
