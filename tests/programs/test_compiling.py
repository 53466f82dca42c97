"""torch.compile on a transformer, before its split or after: blocks here are compiled, the picture is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch

import mesh_core
from tests.support import pipelines
from tests.support.split_klein import SplitKlein, run_split


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def in_place_as_one_graph(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager", fullgraph=True)


def repeated_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


def wrapped(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def wrapped_as_one_graph(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)


WAYS = [in_place, in_place_as_one_graph, repeated_blocks, wrapped]


@pytest.mark.parametrize(
    ("when", "compile_it"),
    [*product(["before", "after"], WAYS), ("before", wrapped_as_one_graph)],
)
def test_a_compiled_transformer_is_split_and_put_together_again(
    klein: SplitKlein, expected: torch.Tensor, when: str, compile_it: Callable[[Any], None]
) -> None:
    pipe = klein.whole()
    if when == "before":
        compile_it(pipe)
    klein.split(pipe)
    if when == "after":
        compile_it(pipe)
    assert torch.equal(run_split(pipe), expected)
    klein.split(pipe, ":1")
    assert torch.equal(run_split(pipe), expected)
    mesh_core.set_loras(pipe, [])
    mesh_core.unsplit(pipe)
    assert torch.equal(pipelines.run(pipe), expected)


def test_a_split_transformer_as_one_graph_is_refused_with_the_way_that_works(klein: SplitKlein) -> None:
    pipe = klein.split(klein.whole())
    wrapped_as_one_graph(pipe)
    with pytest.raises(Exception, match=r"pipe\.transformer\.compile\(\) compiles the blocks that run here"):
        pipelines.run(pipe)
    mesh_core.unsplit(pipe)


@pytest.mark.parametrize("way", ["compile", "compile_repeated_blocks"])
def test_exactly_the_blocks_that_run_here_are_compiled(klein: SplitKlein, expected: torch.Tensor, way: str) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe = klein.split(klein.whole())
    getattr(pipe.transformer, way)(backend=backend, fullgraph=True)
    assert torch.equal(run_split(pipe), expected)
    assert 1 <= len(graphs) <= 2
    mesh_core.unsplit(pipe)
