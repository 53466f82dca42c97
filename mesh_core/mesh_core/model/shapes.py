"""Shapes as a model family describes them: sizes that the model fixes, and words for those that each call chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mesh_core.errors import WireMalformed

Dimensions = tuple[int | str, ...]
"""Per dimension a size, or a word for one, the same wherever the word stands; ``"text+image"`` is a sum of two."""


def resolve(described: Mapping[str, Dimensions], shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """``shapes`` by tensor, as they are once each tensor is repeated to the size of the others.

    A dimension of 1 stands for any size that a word has, as torch repeats it. Tensors that are not described stay as
    they are.

    Raises:
        WireMalformed: a tensor has another number of dimensions than described, or a size that does not fit.
    """
    sizes = _sizes(described, shapes)
    resolved: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        wanted = described.get(name, tuple(shape))
        full = tuple(_size(word, size, sizes) for word, size in zip(wanted, shape, strict=True))
        if any(
            size not in (whole, 1 if isinstance(word, str) else whole)
            for word, whole, size in zip(wanted, full, shape, strict=True)
        ):
            raise _misfit(name, shape, wanted)
        resolved[name] = full
    return resolved


def foretell(
    before: Mapping[str, Dimensions], shapes: Mapping[str, Sequence[int]], after: Mapping[str, Dimensions]
) -> dict[str, tuple[int, ...]]:
    """The shapes that tensors described by ``after`` have, in a call whose tensors ``shapes`` are described by
    ``before``. Those with a size that does not follow from it are left out.

    Raises:
        WireMalformed: a tensor has another number of dimensions than described.
    """
    sizes = _sizes(before, shapes)
    found = {name: tuple(_size(word, -1, sizes) for word in wanted) for name, wanted in after.items()}
    return {name: shape for name, shape in found.items() if -1 not in shape}


def _sizes(described: Mapping[str, Dimensions], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """What each word stands for."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        wanted = described.get(name, tuple(shape))
        if len(wanted) != len(shape):
            raise _misfit(name, shape, wanted)
        for word, size in zip(wanted, shape, strict=True):
            if isinstance(word, str):
                sizes[word] = max(size, sizes.get(word, size))
    return sizes


def _size(word: int | str, size: int, sizes: Mapping[str, int]) -> int:
    if isinstance(word, int):
        return word
    parts = word.split("+")
    return sum(sizes[part] for part in parts) if all(part in sizes for part in parts) else size


def _misfit(name: str, shape: Sequence[int], wanted: Dimensions) -> WireMalformed:
    text = ", ".join(map(str, wanted))
    return WireMalformed(f"{name} came as {list(shape)}; beside the other tensors it has the shape [{text}].")
