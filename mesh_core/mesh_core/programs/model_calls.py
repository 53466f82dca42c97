"""Calls of diffusers and PyTorch on a split transformer, other than LoRAs': as on a whole one, or refused by name.

What is done to blocks would be done to those of this machine only, so it is refused while workers run some. What is
asked of all weights is answered from here and from the files that the model was read from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from mesh_core.errors import UnsupportedInput
from mesh_core.host.runner import SplitRunner
from mesh_core.model.tensors import stored_tensors
from mesh_core.model.weights import WeightReader
from mesh_core.programs.foreign_parts import UNSPLIT_HINT
from mesh_core.programs.peft import PeftLoras
from mesh_core.programs.same_weights import checkpoint_of

COPIES = ("__deepcopy__", "__reduce_ex__")
"""How Python copies and pickles a model; a copy would hold this one's connections."""

BLOCKWISE: dict[str, str] = {
    "add_module": "another module",
    "apply": "a function applied to all modules",
    "enable_cache": "a cache between its blocks",
    "enable_gradient_checkpointing": "training",
    "enable_group_offload": "group offloading",
    "enable_layerwise_casting": "a type that differs from layer to layer",
    "enable_parallelism": "parallelism over the devices of this machine",
    "fuse_qkv_projections": "fused projections",
    "register_buffer": "another buffer",
    "register_module": "another module",
    "register_parameter": "another parameter",
    "set_attn_processor": "another attention processor",
    "set_extra_state": "another state",
    "set_submodule": "another module",
    "to_empty": "memory without weights",
}
"""Methods of a transformer that change its blocks or parameters, and what each brings: refused while it is split."""


class ModelCalls(nn.Module):
    """Mixed into a split transformer, in front of its own class."""

    mesh: SplitRunner
    _mesh_loras: PeftLoras

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A whole model: ``type(model).from_config(...)`` means the class of diffusers."""
        return cls.__bases__[1](*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (nn.Module, nn.Parameter)) and (name in self._modules or name in self._parameters):
            raise _refusal(f"another {name}")
        super().__setattr__(name, value)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As PyTorch's, for the blocks that run here; workers run theirs as they are."""
        for block in self.mesh.local.block_modules():
            block.compile(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As PyTorch's: also of blocks that were never read, which are read now.

        Raises:
            UnsupportedInput: it has LoRAs.
            CheckpointError: what is missing cannot be read any more.
        """
        if self._mesh_loras.loaded or self._mesh_loras.in_use():
            raise UnsupportedInput(
                "The weights of a split model with LoRAs are on several machines.",
                hint="unload the LoRAs first, or unsplit()",
            )
        found = cast("dict[str, Any]", super().state_dict(*args, **kwargs))
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        missing = {name for name, tensor in stored_tensors(self).items() if tensor.is_meta}
        for name, parameter in self._mesh_read(missing).items():
            found[prefix + name] = parameter if kwargs.get("keep_vars") else parameter.detach()
        return found

    def _mesh_read(self, names: set[str]) -> dict[str, Tensor]:
        if not names:
            return {}
        checkpoint = checkpoint_of(self.mesh)
        with torch.device("meta"):
            whole = checkpoint.adapter.skeleton(checkpoint.spec).requires_grad_(False)
        wanted = {name: checkpoint.spec.parameters[name] for name in names}
        numerics = cast(Any, self)._mesh_numerics
        WeightReader(checkpoint.header).fill(whole, wanted, device=torch.device("cpu"), numerics=numerics)
        return {name: tensor for name, tensor in stored_tensors(whole).items() if name in names}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: UnsupportedInput. Workers would go on with the weights that they have."""
        raise UnsupportedInput("A split model takes no other weights: its workers would not.", hint="unsplit() first")


def _refusal(what: str) -> UnsupportedInput:
    return UnsupportedInput(
        f"{what[0].upper()}{what[1:]}: not while the transformer is split, workers would not have it.",
        hint=UNSPLIT_HINT,
    )


def _refusing(name: str, what: str) -> Callable[..., Any]:
    def call(self: ModelCalls, *args: Any, **kwargs: Any) -> Any:
        if not self.mesh.plan.remote:
            return getattr(super(ModelCalls, self), name)(*args, **kwargs)
        raise _refusal(what)

    call.__name__, call.__doc__ = name, "Refused while workers run blocks: UnsupportedInput."
    return call


def _no_copy(self: ModelCalls, *args: Any) -> NoReturn:
    raise UnsupportedInput(
        "A split model cannot be copied or pickled: its connections and its workers' blocks are no part of it.",
        hint="unsplit() first, or save_pretrained() and load_pipeline()",
    )


for _name, _what in BLOCKWISE.items():
    setattr(ModelCalls, _name, _refusing(_name, _what))
for _name in COPIES:
    setattr(ModelCalls, _name, _no_copy)
