"""The canonical form of a LoRA: patches, in order. Knows no file, no naming, no family.

Identity is content: two LoRAs are the same exactly when they patch the same rows in the same way with the same
bits, whatever file, naming or program they came from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from blake3 import blake3

from mesh_core.loras.bounds import check_amount
from mesh_core.loras.patch import Patch, canonical
from mesh_core.model.spec import ModelSpec

_VERSION = b"mesh-lora-1"


@dataclass(frozen=True)
class Lora:
    """Patches that belong together, in the order in which they apply.

    Attributes:
        name: for people.
        unmatched: keys of the file that name no parameter of the model.
        metadata: of the file.
    """

    name: str
    family: str
    patches: tuple[Patch, ...]
    unmatched: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, spec: ModelSpec, patches: Iterable[Patch], **more: Any) -> Lora:
        """``patches`` checked against ``spec`` and brought into the canonical order.

        Raises:
            LoraError: more patches than a LoRA has; see `mesh_core.loras.bounds`.
            LoraError, LoraUnmatched: see `Patch.check`.
        """
        checked = [canonical(p) for p in patches]
        check_amount(checked)
        for patch in checked:
            patch.check(spec)
        # Stable: patches of the same rows keep their order, which matters; that of others does not.
        ordered = sorted(checked, key=lambda p: (p.target[0].parameter, p.target[0].start))
        return cls(name, spec.family, tuple(ordered), **more)

    @cached_property
    def outline(self) -> str:
        """Like `id`, without the content of tensors: a LoRA with another outline is another, and need not be read."""
        return _combine(p.outline for p in self.patches)

    @cached_property
    def id(self) -> str:
        """Hash of everything that the LoRA does, in hex."""
        return _combine(p.digest for p in self.patches)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(p.nbytes for p in self.patches)

    def __bool__(self) -> bool:
        return bool(self.patches)

    def restricted(self, parameters: Collection[str]) -> Lora:
        """The patches that change one of ``parameters``."""
        wanted = frozenset(parameters)
        return replace(self, patches=tuple(p for p in self.patches if p.parameters & wanted))


@dataclass(frozen=True)
class Applied:
    """A LoRA with the strengths that it is used with.

    Attributes:
        strength: of the change.
        strength_model: what the weight is multiplied with before; 1 everywhere but in ComfyUI's model merging.
        send: have it sent to workers that lack it, however large it is.
    """

    lora: Lora
    strength: float = 1.0
    strength_model: float = 1.0
    send: bool = False

    @property
    def key(self) -> tuple[str, float, float]:
        """Equal for two that do the same."""
        return self.lora.id, self.strength, self.strength_model


def set_key(loras: Sequence[Applied]) -> tuple[tuple[str, float, float], ...]:
    """Equal for two sets that do the same in the same order."""
    return tuple(a.key for a in loras if a.lora)


def _combine(digests: Iterable[str]) -> str:
    hasher = blake3(_VERSION)
    for digest in digests:
        hasher.update(digest.encode())
    return hasher.hexdigest()
