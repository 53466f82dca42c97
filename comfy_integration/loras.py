"""LoRAs in the graph, for the blocks on workers: what ComfyUI's patcher holds for them when sampling starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mesh_core.errors import UnsupportedInput

if TYPE_CHECKING:
    from .split import Split


def transfer(patcher: Any, split: Split) -> None:
    """Have the workers apply what ``patcher`` holds for their blocks.

    Raises:
        UnsupportedInput: something that cannot be carried; named.
    """
    remote = [key for key in patcher.patches if key in split.remote_names]
    if remote:
        raise UnsupportedInput(f"A LoRA changes {len(remote)} weights of blocks on a worker.", hint="all blocks local")
