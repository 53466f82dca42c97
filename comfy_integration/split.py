"""A model whose blocks behind a cut run on workers, as ComfyUI samples it.

Joins three things: ComfyUI's patcher (wrappers around sampling and around the model's forward), the family's side
(where to leave that forward), and the core's session (the remote blocks). Knows no family and no socket.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from mesh_core.errors import MeshError, PeerLost, TransportTimeout, Unreachable
from mesh_core.host.session import Session
from mesh_core.model.spec import Conditioning, State
from mesh_core.system.device import synchronise
from mesh_core.system.logs import logger

from .cut import ModelCut
from .loras import loras_for_workers
from .node_settings import OnFailure
from .pack_state import PackState
from .patching import KEY, SplitMark, patcher_over, sampling_patcher
from .refusals import refuse_options, refuse_what_cannot_cross
from .status import NodeState
from .weight_source import UNREAD, WeightSource
from .whole_model import Forward, refuse_if_too_large, run_whole_here

log = logger(__name__)

_LOST = (PeerLost, Unreachable, TransportTimeout)


@dataclass
class Split:
    """A model that is split, from when its node ran.

    Attributes:
        source: of the weights, for when the whole model has to run here.
        models: ComfyUI's models of the local blocks: one, and others if ComfyUI wanted more. What holds this must not
            keep them alive.
    """

    pack: PackState
    node: str
    source: WeightSource
    cut: ModelCut
    session: Session
    on_failure: OnFailure
    models: weakref.WeakSet[Any]
    _sequences: dict[Any, str] = field(default_factory=dict)
    _whole: Forward | None = None

    def sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ComfyUI's whole sampling: what can be refused before it starts is."""
        guider = executor.class_obj
        refuse_what_cannot_cross(guider.model_patcher, guider.model_options, _conditionings(guider), self.cut)
        self._sequences.clear()
        self._whole = None
        self.session.begin()
        self.session.set_loras(loras_for_workers(guider.model_patcher, self.cut))
        try:
            return executor(*args, **kwargs)
        except MeshError as error:
            self.pack.status.fail(self.node, error)
            raise
        finally:
            self._whole = None

    def forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one forward pass of the model."""
        model = executor.class_obj
        if self._whole is not None:
            return self._whole(executor, args, kwargs)
        own = next((own for own in self.models if own.diffusion_model is model), None)
        if own is None:
            return executor(*args, **kwargs)
        executor.original = self._checked(executor.original)
        began = perf_counter()
        sequence = self._sequence(args, kwargs)

        def remote(state: State, conditioning: Conditioning) -> State:
            synchronise(self.session.options.device)
            state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
            local_ms = (perf_counter() - began) * 1e3
            result = self.session.run(state, conditioning, sequence=sequence, local_ms=local_ms)
            self.pack.status.step(self.node, self.session.stats.steps[-1], self.session.stats.reconnects)
            return result

        try:
            return self.cut.side.run(model, executor, args, kwargs, self.cut.local, remote)
        except _LOST as error:
            if self.on_failure is not OnFailure.RUN_HERE:
                raise
            self._whole = self._run_whole_here(own, error)
            return self._whole(executor, args, kwargs)

    def _checked(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's own forward pass, which sees the options as guidance functions, hooks and wrappers left them."""
        parameters = inspect.signature(forward)

        def checked(*args: Any, **kwargs: Any) -> Any:
            options = parameters.bind(*args, **kwargs).arguments.get("transformer_options")
            refuse_options(options or {}, self.cut)
            return forward(*args, **kwargs)

        return checked

    def _run_whole_here(self, own: Any, error: MeshError) -> Forward:
        current = sampling_patcher(own)
        refuse_if_too_large(self.cut.spec, current.load_device, self.session.options.dtype, error)
        log.warning("%s The model runs here from now on.", error.message)
        self.pack.status.change(self.node, NodeState.LOCAL, f"{error.message} All blocks run here.")
        return run_whole_here(self.source, current)

    def _sequence(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The name of one of several interleaved runs: conditional, unconditional, areas."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, dict) and "cond_or_uncond" in value:
                which = (tuple(value["cond_or_uncond"]), tuple(str(u) for u in value.get("uuids", ())))
                return self._sequences.setdefault(which, str(len(self._sequences)))
        return ""


def attach(patcher: Any, local: Callable[[], Any], split: Split | None) -> Any:
    """``patcher`` as a patcher of a copy of its model with the local blocks, run as ``split`` says.

    Args:
        local: makes such a copy.
    """

    def noted() -> Any:
        model = local()
        if split is not None:
            split.models.add(model)
        return model

    model = noted()
    result = patcher_over(patcher, model, noted)
    result.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, UNREAD)
    result.remove_attachments(UNREAD)
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
    result.set_attachments(KEY, SplitMark())
    weakref.finalize(model, split.session.close)
    return result


def _conditionings(guider: Any) -> Iterator[Mapping[str, Any]]:
    for listed in guider.conds.values():
        yield from listed
