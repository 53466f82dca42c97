"""What a name in a LoRA means: from a tensor's name in any layout of a family to rows of the model's parameters.

The families' layouts come from their adapters (`ModelAdapter.layouts`); what stands before and after a name in LoRA
files is the same for all families and is known here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from mesh_core.loras.patch import Rows
from mesh_core.model.adapter import ModelAdapter
from mesh_core.model.spec import ModelSpec, Piece

_DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_JOINED = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Prefixes of names whose dots were replaced: kohya and ComfyUI, OneTrainer, LyCORIS and SimpleTuner."""


class ParameterNames:
    """All names of one model's parameters."""

    def __init__(self, adapter: ModelAdapter, spec: ModelSpec) -> None:
        own = {name: p.pieces for name, p in spec.parameters.items()}
        themselves = {name: (Piece(name),) for name in spec.parameters}
        self._tensors: dict[str, tuple[Rows, ...]] = {}
        layouts: list[Mapping[str, Sequence[Piece]]] = [own, themselves, *adapter.layouts(spec)]
        for layout in layouts:
            for name, rows in _inverted(layout, spec).items():
                self._tensors.setdefault(without_prefix(name), rows)
        self._modules: dict[str, tuple[Rows, ...]] = {}
        self._joined: dict[str, tuple[Rows, ...]] = {}
        for name, rows in self._tensors.items():
            stem = name.removesuffix(".weight")
            self._modules.setdefault(stem, rows)
            self._joined.setdefault(stem.replace(".", "_"), rows)

    def tensor(self, name: str) -> tuple[Rows, ...] | None:
        """Rows of the tensor with this whole name, for example ``double_blocks.0.img_attn.qkv.weight``."""
        return self._tensors.get(without_prefix(name))

    def module(self, key: str) -> tuple[Rows, ...] | None:
        """Rows of the weight of the module that the stem of a LoRA key names."""
        for prefix in _JOINED:
            if key.startswith(prefix):
                return self._joined.get(key.removeprefix(prefix).lstrip("_"))
        found = self._modules.get(without_prefix(key))
        return found if found is not None else self._joined.get(key)

    def bias(self, key: str) -> tuple[Rows, ...] | None:
        """Rows of the bias of the module that the stem of a LoRA key names."""
        return self.module(f"{key}_bias" if key.startswith(_JOINED) else f"{key}.bias")


def without_prefix(name: str) -> str:
    """What a file calls a tensor or module, as the model itself calls it."""
    shorter = True
    while shorter:
        shorter = False
        for prefix in _DOTTED:
            if name.startswith(prefix):
                name, shorter = name.removeprefix(prefix), True
    return name


def _inverted(layout: Mapping[str, Sequence[Piece]], spec: ModelSpec) -> dict[str, tuple[Rows, ...]]:
    parts: dict[str, list[tuple[int, Rows]]] = defaultdict(list)
    for parameter, pieces in layout.items():
        size = (spec.parameters[parameter].shape or (1,))[0]
        position = 0
        for piece in pieces:
            count = size - position if piece.stop is None else piece.stop - piece.start
            parts[piece.tensor].append((piece.start, Rows(parameter, position, position + count)))
            position += count
    found = {}
    for tensor, rows in parts.items():
        ordered = sorted(rows, key=lambda item: item[0])
        starts = [start for start, _ in ordered]
        ends = [start + len(r) for start, r in ordered]
        # Rows that the model does not use would have no parameter to stand for them.
        if starts == [0, *ends[:-1]]:
            found[tensor] = tuple(r for _, r in ordered)
    return found
