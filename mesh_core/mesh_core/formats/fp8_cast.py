"""8-bit floats that are the numbers themselves: no scale belongs to them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from mesh_core.errors import CheckpointUnrecognised
from mesh_core.formats import fused
from mesh_core.formats.arithmetic import in_type, way_and_type
from mesh_core.formats.float8 import TYPES, checked_codes
from mesh_core.formats.markers import COMPANIONS, marked_layers
from mesh_core.model.stored import Claim, Header, Parts, StoredTensor, WeightFormat

CAST = "torch/fp8-cast"
"""The nearest number of the type: exact, since each of these types has all that 8-bit floats have."""


class Fp8CastFormat(WeightFormat):
    """Kinds ``F8_E4M3`` and ``F8_E5M2``. Parts: ``codes``, in the type and shape of the file.

    Not only weights of layers are stored so, but whatever a converter found: biases, norms, tables.
    """

    name = "fp8-cast"

    def claim(self, header: Header) -> Claim:
        """Tensors of the two types that nothing else is said of."""
        found = [info for info in header.tensors.values() if info.dtype in TYPES]
        if not found:
            return Claim()
        layers = marked_layers(header).layers
        names = sorted(header.tensors)
        return Claim(
            {
                info.name: StoredTensor(self, info.dtype, info.shape, {"codes": info})
                for info in found
                if info.name.removesuffix(".weight") not in layers and _alone(header, info.name, names)
            }
        )

    def in_memory(self, stored: StoredTensor, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """As in the file."""
        return {"codes": checked_codes(stored, parts["codes"])}

    def nbytes(self, stored: StoredTensor, rows: int) -> int:
        """One for each number."""
        return rows * (stored.parts["codes"].nbytes // stored.shape[0] if stored.shape and stored.shape[0] else 1)

    def arithmetics(self, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """One, everywhere."""
        return in_type((CAST,), dtype) if kind in TYPES else ()

    def dequantise(
        self, parts: Parts, kind: str, shape: tuple[int, ...], dtype: torch.dtype, arithmetic: str
    ) -> Tensor:
        """The codes in another type."""
        codes = parts["codes"]
        _, made_in = way_and_type(self, kind, arithmetic, (CAST,), dtype, codes.device)
        return fused.numbers("fp8", parts, shape, made_in, lambda some: some["codes"].to(made_in)).to(dtype)


def _alone(header: Header, name: str, names: Sequence[str]) -> bool:
    """Whether no other tensor says what a tensor means; one whose companions a format may know is left to that.

    Raises:
        CheckpointUnrecognised: another tensor belongs to it, and no format knows that one.
    """
    module, dot, leaf = name.rpartition(".")
    beside = f"{module}{dot}"
    if leaf in COMPANIONS or (leaf.startswith("weight_") and f"{beside}weight" in header.tensors):
        return False
    if leaf == "weight" and any(f"{beside}{companion}" in header.tensors for companion in COMPANIONS):
        return False
    for start in (f"{name}.", f"{name}_"):
        at = bisect_left(names, start)
        if at < len(names) and names[at].startswith(start):
            raise CheckpointUnrecognised(
                f"{header.path} stores {name} in {header.tensors[name].dtype} with {names[at]} beside it, and nothing "
                "here knows what that means.",
                hint="an fp8 file without scales, or with those that ComfyUI or diffusers read",
            )
    return True
