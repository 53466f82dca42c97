"""LoRAs on a model in memory: merged from the untouched base, so nothing drifts and everything can be undone.

A patched parameter is a new tensor; the base stays as it was, on the device while there is room and in host memory
otherwise. Merging computes in float32 and rounds once, whatever the number of LoRAs, as ComfyUI does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mesh_core.errors import LoraError
from mesh_core.loras.algorithms import ALGORITHMS
from mesh_core.loras.patch import Applied, Patch
from mesh_core.loras.tensors import check_finite
from mesh_core.model.weights import assign

Entry = tuple[Applied, Patch]


class PatchedModel:
    """The parameters of ``model`` that LoRAs changed, and what they were before. Used by one thread at a time.

    Args:
        parameters: names that the model holds here; patches of others are left to whoever holds those.
        merged: called with this object, the name and the value of every new patched parameter. It is handed this
            object because a callback that held a reference of its own would keep the parameters alive.
        restored: gives the parameter to put back for an untouched one; by default that one, moved to the device.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[str],
        *,
        merged: Callable[[PatchedModel, str, nn.Parameter], None] = lambda model, name, parameter: None,
        restored: Callable[[str, nn.Parameter], nn.Parameter] | None = None,
    ) -> None:
        self.model, self.parameters = model, frozenset(parameters)
        self._merged, self._restored = merged, restored
        self._base: dict[str, nn.Parameter] = {}
        self._loaded: dict[int, tuple[Patch, dict[str, Tensor]]] = {}
        self._owners: dict[str, tuple[nn.Module, str]] = {}

    @property
    def base(self) -> Mapping[str, nn.Parameter]:
        """The untouched parameters of which the model holds a patched version, by name."""
        return self._base

    def park(self, name: str) -> nn.Parameter:
        """Keep the untouched version in host memory; returns it there."""
        base = self._base[name]
        if base.device.type != "cpu":
            base = self._base[name] = nn.Parameter(_host_copy(base.data), requires_grad=False)
        return base

    def apply(self, loras: Sequence[Applied], check: Callable[[], None] = lambda: None) -> int:
        """Make the model what its base is with exactly ``loras``, in their order. Returns how many parameters are
        patched then.

        Args:
            check: called before each parameter; may raise, which leaves a part of the model as it was. Applying any
                set again makes it whole.

        Raises:
            LoraError: a file changed, holds values that are not finite, or joins weights of several machines.
        """
        entries = [(a, p) for a in loras for p in a.lora.patches if p.parameters & self.parameters]
        groups = _groups([p for _, p in entries], self.parameters)
        work: dict[frozenset[str], list[Entry]] = defaultdict(list)
        for entry in entries:
            work[groups[next(iter(entry[1].parameters))]].append(entry)
        patched = {name for group in work for name in group}
        for name in self._base.keys() - patched:
            check()
            self._restore(name)
        with torch.no_grad():
            for group, members in work.items():
                check()
                self._merge(group, members)
        used = {id(p) for _, p in entries}
        self._loaded = {key: kept for key, kept in self._loaded.items() if key in used}
        return len(patched)

    def _restore(self, name: str) -> None:
        base, here = self._base[name], self._parameter(name)
        if self._restored is not None:
            base = self._restored(name, base)
        elif base.device != here.device:
            base = nn.Parameter(base.data.to(here.device), requires_grad=False)
        self._assign(name, base)
        del self._base[name]

    def _merge(self, group: frozenset[str], entries: Sequence[Entry]) -> None:
        weights: dict[str, Tensor] = {}
        for name in sorted(group):
            here = self._parameter(name)
            base = self._base.setdefault(name, here).data
            # One after the other: both at once would convert in host memory, and send twice the bytes.
            weights[name] = base.to(here.device, non_blocking=True).to(torch.float32)
        for applied, patch in entries:
            _apply(patch, self._tensors(patch), applied, weights)
        for name, weight in weights.items():
            parameter = nn.Parameter(weight.to(self._parameter(name).dtype), requires_grad=False)
            self._assign(name, parameter)
            self._merged(self, name, parameter)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that has the parameter, and its name there."""
        found = self._owners.get(name)
        if found is None:
            owner, _, leaf = name.rpartition(".")
            found = self._owners[name] = (self.model.get_submodule(owner), leaf)
        return found

    def _parameter(self, name: str) -> nn.Parameter:
        owner, leaf = self._owner(name)
        parameter = owner._parameters[leaf]
        assert parameter is not None, name
        return parameter

    def _assign(self, name: str, parameter: nn.Parameter) -> None:
        owner, leaf = self._owner(name)
        assign(owner, leaf, parameter)

    def _tensors(self, patch: Patch) -> Mapping[str, Tensor]:
        known = self._loaded.get(id(patch))
        if known is None:
            tensors = {}
            for role, source in patch.tensors.items():
                tensors[role] = source.load()
                check_finite(tensors[role], f"The LoRA tensor {role} for {patch.target[0].parameter}")
            known = self._loaded[id(patch)] = (patch, tensors)
        return known[1]


def _host_copy(tensor: Tensor) -> Tensor:
    copy = tensor.to("cpu")
    try:
        # Page-locked memory is read several times faster by the device; there may not be enough of it.
        return copy.pin_memory() if tensor.device.type == "cuda" else copy
    except RuntimeError:
        return copy


def _groups(patches: Sequence[Patch], held: frozenset[str]) -> dict[str, frozenset[str]]:
    """For each patched parameter, those that must be merged together with it: patches of fused weights join some."""
    groups: dict[str, frozenset[str]] = {}
    for patch in patches:
        if missing := patch.parameters - held:
            raise LoraError(f"A patch joins {min(patch.parameters & held)} with {min(missing)}, which is not here.")
        joined = frozenset(n for name in patch.parameters for n in groups.get(name, {name}))
        for name in joined:
            groups[name] = joined
    return groups


def _apply(patch: Patch, tensors: Mapping[str, Tensor], applied: Applied, weights: dict[str, Tensor]) -> None:
    rows = patch.target
    parts = [weights[r.parameter][r.start : r.stop] for r in rows]
    before = torch.cat(parts) if len(parts) > 1 else parts[0]
    part = before.narrow(*patch.narrow) if patch.narrow is not None else before
    if applied.strength_model != 1.0:
        part = part * applied.strength_model
    here = {role: t.to(part.device, torch.float32) for role, t in tensors.items()}
    after = ALGORITHMS[patch.algorithm].apply(part, here, patch.alpha, applied.strength)
    if patch.narrow is not None:
        changed, dim = before.clone(), patch.narrow
        changed.narrow(*dim).copy_(after)
        after = changed
    position = 0
    for r in rows:
        new, whole = after[position : position + len(r)], weights[r.parameter]
        position += len(r)
        if len(r) != len(whole):
            # Never into ``whole``: it may be the untouched parameter itself.
            new = torch.cat([whole[: r.start], new, whole[r.stop :]])
        weights[r.parameter] = new
