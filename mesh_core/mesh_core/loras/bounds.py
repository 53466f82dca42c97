"""How much one LoRA may ask for. Real ones stay far below; without bounds, a small file could ask for hours of work.

Merging one patch costs a pass over the whole of each weight that it names, however small its own tensors are. So the
number of patches is bounded, in total and of each weight, and how many weights are merged together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mesh_core.errors import LoraError
from mesh_core.loras.patch import Patch
from mesh_core.model.checkpoint import CheckpointHeader, read_header

SENT_HEADER = 4 << 20
"""Bytes of the header of a LoRA that is sent: a few hundred for each of its patches."""

OWN_HEADER = 16 << 20
"""Of a file of the user's own: trainers store the tags of all their pictures in it."""

MOST_TENSORS = 16_384
_LONGEST_NAME = 1000
MOST_PATCHES = 8192
MOST_PATCHES_OF_A_WEIGHT = 32
"""Of one LoRA: where a model fuses layers that its trainer knew apart, each of them is patched, and in several ways."""

MOST_PATCHES_AT_ONCE = 512
"""Of weights that are merged together, by all LoRAs of a session."""

MOST_ROWS = 16
"""Stretches of weights that one patch joins, and parameters that must be merged together."""


def read_lora_header(path: Path, most: int = OWN_HEADER) -> CheckpointHeader:
    """The header of a LoRA's file.

    Raises:
        CheckpointError: no safetensors file, a damaged one, or one with a header of more than ``most`` bytes.
        LoraError: more tensors than a LoRA has, or longer names.
    """
    header = read_header(path, most)
    if len(header.tensors) > MOST_TENSORS:
        raise LoraError(f"{path} holds {len(header.tensors)} tensors; a LoRA has at most {MOST_TENSORS}.")
    if any(len(name) > _LONGEST_NAME for name in header.tensors):
        raise LoraError(f"{path} holds a tensor with a name of more than {_LONGEST_NAME} characters.")
    return header


def check_amount(patches: Sequence[Patch]) -> None:
    """Raises:
    LoraError: more patches than a LoRA has, of all weights or of one.
    """
    if len(patches) > MOST_PATCHES:
        raise LoraError(f"A LoRA of {len(patches)} patches; at most {MOST_PATCHES} are accepted.")
    if any(len(p.target) > MOST_ROWS for p in patches):
        raise LoraError(f"A patch that joins more than {MOST_ROWS} stretches of weights.")
    counts = Counter(name for p in patches for name in p.parameters)
    for name, count in counts.most_common(1):
        if count > MOST_PATCHES_OF_A_WEIGHT:
            raise LoraError(f"{count} patches of {name[:200]}; at most {MOST_PATCHES_OF_A_WEIGHT} are accepted.")
