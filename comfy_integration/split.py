"""A model whose blocks behind a cut run on workers, as ComfyUI samples it.

Joins three things: ComfyUI's patcher (wrappers around sampling and around the model's forward), the family's side
(where to leave that forward), and the core's session (the remote blocks). Knows no family and no socket.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from mesh_core.errors import MeshError, PeerLost, TransportTimeout, Unreachable
from mesh_core.host.session import Session
from mesh_core.model.library import Checkpoint
from mesh_core.model.spec import Conditioning, ModelSpec, State
from mesh_core.programs.comfy import ComfySide
from mesh_core.system.device import synchronise

from . import fallback, loras
from .checks import refuse_what_cannot_cross
from .hub import Hub
from .shadow import nbytes
from .source import FILE, Source

log = logging.getLogger(__name__)

KEY = "mesh"
"""Under which wrappers and attachments of this pack are found."""

OnFailure = Literal["wait for it", "run here", "stop"]
_LOST = (PeerLost, Unreachable, TransportTimeout)


@dataclass
class Split:
    """One cut of one model.

    Attributes:
        cut: number of blocks that run here.
        remote_names: ComfyUI's names of the weights that are not here.
    """

    hub: Hub
    node: str
    source: Source
    cut: int
    session: Session
    on_failure: OnFailure
    remote_names: frozenset[str]
    model: Callable[[], Any]
    _sequences: dict[Any, str] = field(default_factory=dict)
    _here: Any = None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    @property
    def side(self) -> ComfySide:
        return self.source.side

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    def sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ComfyUI's whole sampling: all that can be refused is refused before it starts."""
        guider = executor.class_obj
        refuse_what_cannot_cross(guider.model_patcher, guider.model_options, _conditionings(guider), self)
        self._sequences.clear()
        self._here = None
        self.session.begin()
        loras.transfer(guider.model_patcher, self)
        try:
            return executor(*args, **kwargs)
        except MeshError as error:
            self.hub.status.fail(self.node, error)
            raise
        finally:
            self._here = None

    def forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one forward pass of the model."""
        model = executor.class_obj
        if self._here is not None:
            return self._here(executor, args, kwargs)
        own = self.model()
        if own is None or model is not own.diffusion_model:
            return executor(*args, **kwargs)
        began = perf_counter()
        sequence = self._sequence(args, kwargs)

        def remote(state: State, conditioning: Conditioning) -> State:
            synchronise(self.session.options.device)
            state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
            local_ms = (perf_counter() - began) * 1e3
            result = self.session.run(state, conditioning, sequence=sequence, local_ms=local_ms)
            self.hub.status.step(self.node, self.session.stats.steps[-1], self.session.stats.reconnects)
            return result

        try:
            return self.side.run(model, executor, args, kwargs, self.cut, remote)
        except _LOST as error:
            if self.on_failure != "run here":
                raise
            self._here = fallback.whole_model(self, comfy_patcher(own), error)
            return self._here(executor, args, kwargs)

    def _sequence(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The name of one of several interleaved runs: conditional, unconditional, areas."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, dict) and "cond_or_uncond" in value:
                which = (tuple(value["cond_or_uncond"]), tuple(str(u) for u in value.get("uuids", ())))
                return self._sequences.setdefault(which, str(len(self._sequences)))
        return ""


def attach(patcher: Any, model: Any, split: Split | None) -> Any:
    """``patcher`` as a patcher of ``model``, a shadow of its model, run as ``split`` says."""
    result = on_model(patcher, model)
    result.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, FILE)
    result.remove_attachments(FILE)
    if split is None:
        return result

    # Functions, not methods: ComfyUI deep-copies what it holds, and a method would take its session along.
    def around_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return split.sampling(executor, *args, **kwargs)

    @torch.compiler.disable
    def around_forward(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return split.forward(executor, *args, **kwargs)

    result.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, around_sampling)
    result.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, around_forward)
    result.set_attachments(KEY, _Marker())
    weakref.finalize(model, split.session.close)
    return result


class _Marker:
    """Says that a model is split already."""

    def on_model_patcher_clone(self) -> _Marker:
        return self


def on_model(patcher: Any, model: Any) -> Any:
    """A clone of ``patcher`` over another model, with nothing loaded yet."""
    original, size = patcher.model, patcher.size
    # The constructor, which a clone calls, notes on the model what is loaded: that has to be the new one.
    patcher.model, patcher.size = model, max(nbytes(model), 1)
    try:
        result = patcher.clone()
    finally:
        patcher.model, patcher.size = original, size
    model.device = result.offload_device
    result.parent = None
    result.backup, result.object_patches_backup, result.hook_backup = {}, {}, {}
    result.cached_hook_patches, result.current_hooks, result.is_injected = {}, None, False
    result.pinned = set()
    result.weight_inplace_update = False
    return result


def comfy_patcher(model: Any) -> Any:
    """The patcher that samples ``model`` now."""
    return model.current_patcher


def _conditionings(guider: Any) -> Iterator[Mapping[str, Any]]:
    for listed in guider.conds.values():
        yield from listed


def interrupted() -> None:
    """Raises what ComfyUI raises when the user stopped the run."""
    comfy.model_management.throw_exception_if_processing_interrupted()
