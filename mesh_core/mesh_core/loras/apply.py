"""LoRAs on a model in memory: from the untouched base, so nothing drifts and everything can be undone.

A patched parameter is a new tensor; the base stays as it was, on the device while there is room and in host memory
otherwise. Merging computes in float32 and rounds once, whatever the number of LoRAs, as ComfyUI does.
A weight that stays as it is stored is not merged into: see `mesh_core.loras.stored_changes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mesh_core.loras.device_tensors import hold_on
from mesh_core.loras.lora import Applied
from mesh_core.loras.merging import merge
from mesh_core.loras.patch import Patch
from mesh_core.loras.stored_changes import OnNumbers, WithTensors, beside
from mesh_core.loras.tensors import check_finite
from mesh_core.loras.work import Group, work_of
from mesh_core.model.pool import ParameterPool
from mesh_core.model.stored_weight import Change, StoredWeight, numbers
from mesh_core.model.weights import assign, moved

_Key = tuple[int, torch.device | None, torch.dtype | None]
"""Which patch, where its tensors are held, None for nowhere in particular, and in which type, None for their own."""


class PatchedModel:
    """The parameters of ``model`` that LoRAs changed, and what they were before. Used by one thread at a time.

    Args:
        parameters: names that the model holds here; patches of others are left to whoever holds those.
        beside: whether LoRAs are computed beside stored weights where they can be, see `Numerics.loras_beside`.
        pool: shares what is held of LoRAs beside stored weights.
        merged: called with this object, the name and the value of every new parameter with LoRAs merged into it. It is
            handed this object because a callback that held a reference of its own would keep the parameters alive.
        restored: gives the parameter to put back for an untouched one; by default that one, moved to the device.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[str],
        *,
        beside: bool = True,
        pool: ParameterPool | None = None,
        merged: Callable[[PatchedModel, str, nn.Parameter], None] = lambda model, name, parameter: None,
        restored: Callable[[str, nn.Parameter], nn.Parameter] | None = None,
    ) -> None:
        self.model, self.parameters = model, frozenset(parameters)
        self._merged, self._restored = merged, restored
        self._beside, self._pool = beside, pool or ParameterPool()
        self._base: dict[str, nn.Parameter] = {}
        self._loaded: dict[_Key, tuple[Patch, dict[str, Tensor]]] = {}
        self._used: set[_Key] = set()
        self._owners: dict[str, tuple[nn.Module, str]] = {}

    @property
    def base(self) -> Mapping[str, nn.Parameter]:
        """The untouched parameters of which the model holds a patched version, by name."""
        return self._base

    @property
    def merged_on_device(self) -> list[str]:
        """The parameters that are merged into, whose untouched version takes memory of a device beside them."""
        return [n for n, base in self._base.items() if base.device.type != "cpu" and not isinstance(base, StoredWeight)]

    @property
    def holds_tensors(self) -> bool:
        """Whether tensors of LoRAs are held beside stored weights."""
        return any(isinstance(base, StoredWeight) for base in self._base.values())

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
        work = work_of(loras, self.parameters)
        self._used.clear()
        patched = {name for group in work for name in group.parameters}
        for name in self._base.keys() - patched:
            check()
            self._restore(name)
        with torch.no_grad():
            for group in work:
                check()
                self._change(group)
        self._loaded = {key: kept for key, kept in self._loaded.items() if key in self._used}
        return len(patched)

    def _restore(self, name: str) -> None:
        base, here = self._base[name], self._parameter(name)
        if self._restored is not None:
            base = self._restored(name, base)
        elif base.device != here.device:
            base = moved(base, here.device)
        self._assign(name, base)
        del self._base[name]

    def _change(self, group: Group) -> None:
        here = {name: self._parameter(name) for name in sorted(group.parameters)}
        for name, parameter in here.items():
            base = self._base.setdefault(name, parameter)
            if isinstance(base, StoredWeight):
                self._base[name] = moved(base, parameter.device)
        stored = [name for name in here if isinstance(self._base[name], StoredWeight)]
        products = [name for name in stored if self._beside and group.is_beside(name)]
        for name in products:
            weight = self._base[name]
            loaded = [(e, self._tensors(e[1], weight.device, weight.dtype)) for e in group.of(name)]
            self._change_stored(name, beside(name, loaded))
        if len(products) == len(here):
            return
        # What is merged now is used once; what is merged at every step has to be where that is done.
        merged = [name for name in stored if name not in products]
        device = here[merged[0]].device if merged else None
        loaded = [(e, self._tensors(e[1], device)) for e in group.entries]
        for name in merged:
            self._change_stored(name, OnNumbers(name, group.parameters, self._base, loaded))
        plain = [name for name in here if name not in stored]
        if plain:
            self._merge(here, plain, loaded)

    def _change_stored(self, name: str, change: Change) -> None:
        changed = cast(StoredWeight, self._base[name]).changed_by(change)
        self._assign(name, nn.Parameter(changed, requires_grad=False))

    def _merge(self, here: Mapping[str, nn.Parameter], plain: Sequence[str], loaded: Sequence[WithTensors]) -> None:
        weights: dict[str, Tensor] = {}
        for name, parameter in here.items():
            # One after the other: both at once would convert in host memory, and send twice the bytes.
            weights[name] = numbers(moved(self._base[name], parameter.device)).to(torch.float32)
        for (applied, patch), tensors in loaded:
            merge(patch, tensors, applied, weights)
        for name in plain:
            made = nn.Parameter(weights[name].to(here[name].dtype), requires_grad=False)
            self._assign(name, made)
            self._merged(self, name, made)

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

    def _tensors(
        self, patch: Patch, device: torch.device | None, dtype: torch.dtype | None = None
    ) -> Mapping[str, Tensor]:
        """Of a patch by role: held on ``device``; as they are loaded if it is None."""
        key = id(patch), device, dtype
        self._used.add(key)
        known = self._loaded.get(key)
        if known is None:
            tensors: dict[str, Tensor] = {}
            for role, source in patch.tensors.items():
                what = f"The LoRA tensor {role} for {patch.target[0].parameter}"
                if device is not None:
                    tensors[role] = hold_on(device, (source, dtype), self._pool, what)
                else:
                    tensors[role] = source.load()
                    check_finite(tensors[role], what)
            known = self._loaded[key] = (patch, tensors)
        return known[1]


def _host_copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_page_locked(parameter.data), requires_grad=False)


def _page_locked(tensor: Tensor) -> Tensor:
    copy = tensor.to("cpu")
    try:
        # Page-locked memory is read several times faster by the device; there may not be enough of it.
        return copy.pin_memory() if tensor.device.type == "cuda" else copy
    except RuntimeError:
        return copy
