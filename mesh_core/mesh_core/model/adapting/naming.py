"""Names in files: which of a family's namings a checkpoint has, and which block a parameter belongs to."""

from __future__ import annotations

from collections.abc import Container, Mapping

from mesh_core.model.spans import BlockSpan

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""What stands before every name in single files, as ComfyUI and the models' authors write them."""


def find_naming(tensors: Container[str], marks: Mapping[str, str]) -> tuple[str, str] | None:
    """(prefix, naming) of a checkpoint; None if it has none of the family's namings.

    Args:
        tensors: the names in the file.
        marks: by naming, a tensor that every checkpoint of the family has under this name in that naming alone.
    """
    for prefix in PREFIXES:
        for naming, mark in marks.items():
            if prefix + mark in tensors:
                return prefix, naming
    return None


def scope_in_stacks(parameter: str, stacks: Mapping[str, int]) -> BlockSpan | None:
    """The block that a parameter named ``STACK.INDEX.rest`` belongs to; None if it is in none of ``stacks``.

    Args:
        stacks: names of the model's lists of blocks, and the number that the first block of each has in the model.
    """
    stack, _, rest = parameter.partition(".")
    if stack not in stacks:
        return None
    block = stacks[stack] + int(rest.partition(".")[0])
    return BlockSpan(block, block + 1)
