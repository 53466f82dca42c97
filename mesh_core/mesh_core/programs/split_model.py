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

from mesh_core.errors import ConfigError, UnsupportedInput
from mesh_core.host.runner import SplitRunner
from mesh_core.programs.peft import PeftLoras
from mesh_core.programs.peft_calls import LoraCalls
from mesh_core.programs.peft_layers import skeleton


class SplitModel(LoraCalls):
    """Mixed into a transformer's class by `attach`. ``mesh`` runs the plan."""

    mesh: SplitRunner
    _mesh_place: tuple[torch.device, torch.dtype]
    _mesh_sequence: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._mesh_settle_loras()
        inputs = inspect.signature(inspect.unwrap(_own_class(self).forward)).bind(self, *args, **kwargs).arguments
        inputs.pop("self")
        return_dict = inputs.pop("return_dict", True)
        output = self.mesh(inputs, self._mesh_sequence)
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
        return self._mesh_place[0]

    @property
    def dtype(self) -> torch.dtype:
        """In which all machines compute."""
        return self._mesh_place[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(torch.empty(0, device=self.device, dtype=self.dtype))
        if moved.dtype != self.dtype:
            raise UnsupportedInput(
                f"A split model computes in {self.dtype} on all machines; it cannot become {moved.dtype} here alone.",
                hint=f"load_pipeline(..., dtype={moved.dtype})",
            )
        local = {id(p) for name, p in self.named_parameters() if name in self._local_names()}
        others = {id(p) for p in self.parameters()} - local
        cast(Any, super())._apply(lambda t: t if t.is_meta or id(t) in others else fn(t), recurse)
        self._mesh_place = (moved.device, moved.dtype)
        if self.mesh.session is not None:
            self.mesh.session.options = replace(self.mesh.session.options, device=moved.device)
        return self

    def _local_names(self) -> set[str]:
        return set(self.mesh.checkpoint.spec.parameters_of(self.mesh.plan.local))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: ConfigError."""
        raise ConfigError("A split model holds only a part of its weights and cannot be saved.", hint="unsplit() first")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: ConfigError. Workers would go on with the weights that they have."""
        raise ConfigError("A split model takes no other weights: its workers would not.", hint="unsplit() first")


def attach(
    model: nn.Module,
    runner: SplitRunner,
    device: torch.device,
    dtype: torch.dtype,
    loras: PeftLoras | None = None,
) -> None:
    """Make ``model`` run ``runner``; also when it is split already."""
    own = _own_class(model)
    model.__class__ = type(own.__name__, (SplitModel, own), {"__module__": own.__module__})
    split = cast(SplitModel, model)
    split.mesh = runner
    split._mesh_place = (device, dtype)
    split._mesh_sequence = ""
    split._mesh_loras = loras or PeftLoras(runner.checkpoint, skeleton(own, cast(Any, model).config))


def detach(model: nn.Module) -> None:
    """Make ``model`` an ordinary model again."""
    own = _own_class(model)
    model.__class__ = own
    for name in ("mesh", "_mesh_place", "_mesh_sequence", "_mesh_loras"):
        model.__dict__.pop(name, None)


def _own_class(model: nn.Module) -> type[nn.Module]:
    cls = type(model)
    return cast("type[nn.Module]", cls.__bases__[1]) if issubclass(cls, SplitModel) else cls
