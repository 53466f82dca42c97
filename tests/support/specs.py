"""Model specs without a model: blocks of chosen sizes."""

from __future__ import annotations

from collections.abc import Sequence

from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ModelSpec, ParameterSpec, Piece


def spec(sizes: Sequence[int], *, shared: int = 0, edges: int = 0, dtype: str = "BF16") -> ModelSpec:
    """A model whose block i has ``sizes[i]`` weights.

    Args:
        shared: weights that every block needs.
        edges: weights of the input layers, and as many of the output layers.
    """
    n = len(sizes)

    def parameter(name: str, elements: int, start: int, stop: int) -> ParameterSpec:
        return ParameterSpec((elements,), dtype, (Piece(name),), BlockSpan(start, stop))

    parameters = {f"blocks.{i}": parameter(f"blocks.{i}", size, i, i + 1) for i, size in enumerate(sizes)}
    if shared:
        parameters["shared"] = parameter("shared", shared, 0, n)
    if edges:
        parameters["enter"] = parameter("enter", edges, 0, 1)
        parameters["leave"] = parameter("leave", edges, n - 1, n)
    return ModelSpec("fake", "fake", {}, ("double",) * n, ({},) * (n + 1), {}, parameters)
