"""What a model family tells about itself inside ComfyUI: the contract of an adapter's ``comfy.py``.

Imports nothing of ComfyUI: an adapter's ``comfy.py`` and the node pack do. How a family and its side are found is in
`comfy_recognition`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from mesh_core.builtin import installed_plugins
from mesh_core.model.adapter import ModelAdapter
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.spec import Conditioning, ModelSpec, State
from mesh_core.programs.in_memory import header_in_memory

# What a family's comfy.py imports; the rest is the node pack's.
__all__ = ["ComfySide", "Expected", "HandOver", "RemotePart", "hand_over_at", "intercepted"]

MEMORY = Path("(weights in ComfyUI)")
"""Stands for the file of a model that ComfyUI loaded."""

RemotePart = Callable[[State, Conditioning], State]
"""The blocks behind the cut: the state at the cut in, the state at cut N out."""


@dataclass(frozen=True)
class Expected:
    """A function of ComfyUI that is relied on: where it is, and parameters that it must have.

    Attributes:
        module: for example ``"comfy.ldm.wan.model"``.
        name: in the module, for example ``"WanModel.forward_orig"``.
        parameters: names that must be among its parameters; none if it only has to exist.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """What is not as expected, or None."""
        try:
            found: Any = import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            return f"{self.module}.{self.name} is missing ({error})"
        known = inspect.signature(found).parameters if self.parameters else {}
        lacking = [name for name in self.parameters if name not in known]
        return f"{self.module}.{self.name} has no parameter {', '.join(lacking)}" if lacking else None


class HandOver(Exception):
    """Raised in place of the first remote block; carries what ComfyUI called the block with."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        super().__init__("the remote part takes over here")


class ComfySide(ABC):
    """One family inside ComfyUI. Stateless.

    Attributes:
        expects: what of ComfyUI this family relies on; looked at before the first run.
        patches: kinds of block patches (``transformer_options["patches"]``) that cannot be lost at a cut: they act
            before the first block. Any other kind is refused while blocks run remotely.
        refused: keys of a conditioning that cannot cross a cut, and why.
    """

    expects: ClassVar[Sequence[Expected]] = ()
    patches: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, str]] = {}

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter

    def header(self, model: nn.Module) -> CheckpointHeader:
        """Names, shapes and types of ``model``'s tensors, as the adapter recognises them in a file.

        A family whose files state in their metadata what no tensor shows adds it. Called with any family's models.
        """
        return header_of(model)

    @abstractmethod
    def block_key(self, spec: ModelSpec, block: int) -> tuple[str, int]:
        """Under which key ``patches_replace["dit"]`` replaces a block."""

    @abstractmethod
    def run(
        self,
        model: Any,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        cut: int,
        remote: RemotePart,
    ) -> Any:
        """One forward pass of ``model``, ComfyUI's ``diffusion_model``; ``remote`` runs the blocks from ``cut`` on.

        Args:
            forward: ComfyUI's own forward, wrappers of others included; takes ``args`` and ``kwargs``.
            cut: number of blocks that run here. When it is 0, no parameter of ``model`` holds data.

        Returns:
            what ``forward`` would have returned.

        Raises:
            UnsupportedInput: an argument that cannot cross the cut; named, never dropped.
        """


def header_of(model: nn.Module) -> CheckpointHeader:
    """The tensors of ComfyUI's ``model`` as the header of a file would list them."""
    return header_in_memory(model.state_dict(), MEMORY, installed_plugins())


def hand_over_at(options: Mapping[str, Any], key: tuple[str, int]) -> dict[str, Any]:
    """A copy of ``transformer_options`` with which the block ``key`` raises `HandOver` instead of running."""

    def stop(arguments: Mapping[str, Any], extra: Mapping[str, Any]) -> Mapping[str, Any]:
        raise HandOver(arguments)

    replaced = dict(options.get("patches_replace", {}))
    return {**options, "patches_replace": {**replaced, "dit": {**replaced.get("dit", {}), key: stop}}}


@contextmanager
def intercepted(instance: object, method: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """``instance.method`` is ``replacement`` meanwhile; on this instance only."""
    before = instance.__dict__.get(method)
    instance.__dict__[method] = replacement
    try:
        yield
    finally:
        if before is None:
            del instance.__dict__[method]
        else:
            instance.__dict__[method] = before
