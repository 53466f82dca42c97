"""What a set of LoRAs asks of the parameters of a model: which are changed together, and which of them beside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from mesh_core.errors import LoraError
from mesh_core.loras.algorithms import ALGORITHMS
from mesh_core.loras.bounds import MOST_PATCHES_AT_ONCE
from mesh_core.loras.device_tensors import Held
from mesh_core.loras.lora import Applied
from mesh_core.loras.merging import Entry, groups_of
from mesh_core.loras.patch import Patch
from mesh_core.model.spec import ParameterSpec


@dataclass(frozen=True)
class Group:
    """Parameters that are changed together.

    Attributes:
        entries: all patches of one of them, in order.
    """

    parameters: frozenset[str]
    entries: tuple[Entry, ...]

    def of(self, name: str) -> list[Entry]:
        """The patches of one parameter."""
        return [entry for entry in self.entries if name in entry[1].parameters]

    def is_beside(self, name: str) -> bool:
        """Whether one parameter's changes are products of two small matrices alone, which leave it as it is."""
        return all(_is_product(*entry) for entry in self.of(name))


def work_of(loras: Sequence[Applied], held: frozenset[str]) -> list[Group]:
    """What ``loras`` do to the parameters ``held``.

    Raises:
        LoraError: they join weights of several machines, or there are more patches of one weight than anybody means.
    """
    entries = [(a, p) for a in loras for p in a.lora.patches if p.parameters & held]
    groups = groups_of([p for _, p in entries], held)
    work: dict[frozenset[str], list[Entry]] = defaultdict(list)
    for entry in entries:
        work[groups[next(iter(entry[1].parameters))]].append(entry)
    for group, members in work.items():
        if len(members) > MOST_PATCHES_AT_ONCE:
            raise LoraError(
                f"{len(members)} patches of {min(group)} at once; at most {MOST_PATCHES_AT_ONCE} are accepted.",
                hint="fewer LoRAs at once",
            )
    return [Group(group, tuple(members)) for group, members in work.items()]


def held_beside(work: Sequence[Group], stored: Mapping[str, torch.dtype], *, beside: bool) -> Iterator[Held]:
    """The tensors that are held on the device because they change parameters which are stored.

    Args:
        stored: those parameters, with the type of their numbers, which products of theirs are computed in as in PEFT.
        beside: whether products are computed beside them.
    """
    for group in work:
        names = group.parameters & stored.keys()
        merged = [name for name in names if not (beside and group.is_beside(name))]
        if merged:
            yield from ((source, None) for _, patch in group.entries for source in patch.tensors.values())
        for name in names.difference(merged):
            yield from ((source, stored[name]) for _, patch in group.of(name) for source in patch.tensors.values())


def transient_of(work: Sequence[Group], parameters: Mapping[str, ParameterSpec], *, beside: bool) -> int:
    """Bytes that computing with changed parameters needs for the moment, of those that stay as they are stored.

    Args:
        beside: whether products are computed beside them.
    """
    most = 0
    for group in work:
        stored = [name for name in group.parameters if parameters[name].stored_bytes is not None]
        if any(not (beside and group.is_beside(name)) for name in stored):
            most = max(most, *(_while_merging(entry, group, parameters) for entry in group.entries))
    return most


def _while_merging(entry: Entry, group: Group, parameters: Mapping[str, ParameterSpec]) -> int:
    """Bytes that merging one patch holds at most: float32 numbers of the whole group, and of what it changes more."""
    applied, patch = entry
    algorithm = ALGORITHMS[patch.algorithm]
    copies = algorithm.most_copies(patch.tensors) - 1
    copies += (applied.strength_model != 1.0) + (len(patch.target) > 1) + (patch.narrow is not None)
    held = sum(parameters[name].elements for name in group.parameters)
    held += copies * sum(parameters[name].elements for name in patch.parameters)
    return 4 * (held + algorithm.most_of_tensors * sum(prod(source.shape) for source in patch.tensors.values()))


def _is_product(applied: Applied, patch: Patch) -> bool:
    plain = patch.algorithm == "lora" and patch.tensors.keys() == {"up", "down"}
    return plain and patch.narrow is None and applied.strength_model == 1.0
