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
from mesh_core.loras.bounds import MOST_PATCHES_AT_ONCE
from mesh_core.loras.lora import Applied
from mesh_core.loras.merging import Entry, groups_of, merge
from mesh_core.loras.patch import Patch
from mesh_core.loras.tensors import check_finite
from mesh_core.model.stored_weight import StoredWeight, numbers
from mesh_core.model.weights import assign, moved


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
            base = self._base[name] = _host_copy(base)
        return base

    def apply(self, loras: Sequence[Applied], check: Callable[[], None] = lambda: None) -> int:
        """Make the model what its base is with exactly ``loras``, in their order. Returns how many parameters are
        patched then.

        Args:
            check: called before each parameter; may raise, which leaves a part of the model as it was. Applying any
                set again makes it whole.

        Raises:
            LoraError: a file changed, holds values that are not finite, or joins weights of several machines; or there
                are more patches of one weight than anybody means.
        """
        entries = [(a, p) for a in loras for p in a.lora.patches if p.parameters & self.parameters]
        groups = groups_of([p for _, p in entries], self.parameters)
        work: dict[frozenset[str], list[Entry]] = defaultdict(list)
        for entry in entries:
            work[groups[next(iter(entry[1].parameters))]].append(entry)
        for group, members in work.items():
            if len(members) > MOST_PATCHES_AT_ONCE:
                raise LoraError(
                    f"{len(members)} patches of {min(group)} at once; at most {MOST_PATCHES_AT_ONCE} are accepted.",
                    hint="fewer LoRAs at once",
                )
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
            base = moved(base, here.device)
        self._assign(name, base)
        del self._base[name]

    def _merge(self, group: frozenset[str], entries: Sequence[Entry]) -> None:
        weights: dict[str, Tensor] = {}
        for name in sorted(group):
            here = self._parameter(name)
            base = self._base.setdefault(name, here)
            # One after the other: both at once would convert in host memory, and send twice the bytes.
            weights[name] = numbers(moved(base, here.device)).to(torch.float32)
        for applied, patch in entries:
            merge(patch, self._tensors(patch), applied, weights)
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


def _host_copy(parameter: nn.Parameter) -> nn.Parameter:
    if isinstance(parameter, StoredWeight):
        parts = {role: _page_locked(part) for role, part in parameter.parts.items()}
        return nn.Parameter(parameter.with_parts(parts), requires_grad=False)
    return nn.Parameter(_page_locked(parameter.data), requires_grad=False)


def _page_locked(tensor: Tensor) -> Tensor:
    copy = tensor.to("cpu")
    try:
        # Page-locked memory is read several times faster by the device; there may not be enough of it.
        return copy.pin_memory() if tensor.device.type == "cuda" else copy
    except RuntimeError:
        return copy
