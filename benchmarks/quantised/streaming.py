"""The honest rival of a split: one card that streams what it cannot hold, as well as one can write it.

Some blocks' stored weights lie in pinned memory, each block as one stretch of bytes. They come through three slots on a
stream of their own, while blocks before them compute, and are dequantised where they are used like resident ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mesh_core.model.stored_weight import StoredWeight
from mesh_core.system.device import synchronise

SLOTS = 3
_ALIGNED = 512


@dataclass
class _Streamed:
    """A block: its bytes in pinned memory, and where its parameters' parts lie in them."""

    module: nn.Module
    source: Tensor
    places: list[tuple[nn.Module, str, str, int, Tensor]] = field(default_factory=list)


def choose(sizes: Sequence[int], spare: int, resident: int) -> list[int]:
    """Which blocks to stream so that the others' bytes and the slots fit; spread evenly among those of the commonest
    size, or among all of them where those are not enough.

    Args:
        sizes: of the blocks.
        spare: bytes for blocks and slots.
        resident: bytes of all other weights.

    Raises:
        ValueError: not even the slots fit.
    """
    total = sum(sizes) + resident
    common = max(set(sizes), key=sizes.count)
    for among in ([i for i, size in enumerate(sizes) if size == common], list(range(len(sizes)))):
        # The order in which they come is fixed only if they go round whole.
        for count in range(0, len(among) // SLOTS * SLOTS + 1, SLOTS):
            found = [among[i * len(among) // count] for i in range(count)] if count else []
            slots = SLOTS * max((sizes[i] for i in found), default=0)
            if total - sum(sizes[i] for i in found) + slots <= spare:
                return found
    raise ValueError("not even the slots fit into that memory")


def parts_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """(owner, name of the parameter in it, role or "", tensor) of everything that a block holds."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if isinstance(parameter, StoredWeight):
                yield from ((owner, name, role, part) for role, part in parameter.parts.items())
            elif parameter is not None:
                yield owner, name, "", parameter.data


def nbytes(module: nn.Module) -> int:
    """Of a block in a slot."""
    return sum(-(-part.nbytes // _ALIGNED) * _ALIGNED for *_, part in parts_of(module))


@contextmanager
def streamed(blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Stream ``blocks``, in the order in which they run, from pinned memory; afterwards they are resident no more.

    On a CPU the same copies are made, each when its slot is free.
    """
    found = [_taken_out(block) for block in blocks]
    room = max((len(one.source) for one in found), default=0)
    slots = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
    for number, one in enumerate(found):
        _point(one, slots[number % SLOTS])
    line = _CopyLine(device, [one.source for one in found], slots)
    hooks = []
    for number, one in enumerate(found):
        hooks.append(one.module.register_forward_pre_hook(partial(line.wait, number)))
        hooks.append(one.module.register_forward_hook(partial(line.done, number)))
    try:
        with _pinned([one.source for one in found], device):
            for number in range(min(SLOTS, len(found))):
                line.fetch(number)
            yield
            synchronise(device)
    finally:
        for hook in hooks:
            hook.remove()


class _CopyLine:
    """The copies of ``sources`` into ``slots``, on a stream of their own."""

    def __init__(self, device: torch.device, sources: Sequence[Tensor], slots: Sequence[Tensor]) -> None:
        self._cuda, self._device, self._sources, self._slots = device.type == "cuda", device, sources, slots
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._arrived = [torch.cuda.Event() for _ in sources]
            self._used = [torch.cuda.Event() for _ in slots]

    def fetch(self, number: int) -> None:
        """Copy a block into its slot as soon as the block that uses it is done."""
        source, slot = self._sources[number], number % SLOTS
        target = self._slots[slot][: len(source)]
        if not self._cuda:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[slot])
            target.copy_(source, non_blocking=True)
            self._arrived[number].record(self._stream)

    def wait(self, number: int, *_: Any) -> None:
        """Before a block computes."""
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[number])

    def done(self, number: int, *_: Any) -> None:
        """After it."""
        if self._cuda:
            self._used[number % SLOTS].record(torch.cuda.current_stream(self._device))
        self.fetch((number + SLOTS) % len(self._sources))


def _taken_out(block: nn.Module) -> _Streamed:
    """What a block holds, in host memory; its parameters have no memory then."""
    source, at = torch.empty(nbytes(block), dtype=torch.uint8), 0
    made = _Streamed(block, source)
    for owner, name, role, part in parts_of(block):
        flat = part.contiguous().view(-1).view(torch.uint8)
        source[at : at + len(flat)].copy_(flat)
        made.places.append((owner, name, role, at, torch.empty_like(part, device="meta")))
        at += -(-len(flat) // _ALIGNED) * _ALIGNED
    for owner, name, *_ in made.places:
        was: Any = owner._parameters[name]
        empty = was.on("meta") if isinstance(was, StoredWeight) else torch.empty_like(was, device="meta")
        owner._parameters[name] = nn.Parameter(empty, requires_grad=False)
    return made


def _point(one: _Streamed, slot: Tensor) -> None:
    """Make the parameters of a block views of ``slot``."""
    parts: dict[tuple[nn.Module, str], dict[str, Tensor]] = {}
    for owner, name, role, at, like in one.places:
        view = slot[at : at + like.numel() * like.element_size()].view(like.dtype).view(like.shape)
        parts.setdefault((owner, name), {})[role] = view
    for (owner, name), roles in parts.items():
        was: Any = owner._parameters[name]
        data = was.with_parts(roles) if isinstance(was, StoredWeight) else roles[""]
        owner._parameters[name] = nn.Parameter(data, requires_grad=False)


@contextmanager
def _pinned(sources: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Where they are: torch's own pinned memory comes in powers of two."""
    pinned: list[Tensor] = []
    try:
        for source in sources if device.type == "cuda" else ():
            pin(source)
            pinned.append(source)
        yield
    finally:
        for source in pinned:
            torch.cuda.cudart().cudaHostUnregister(source.data_ptr())


def pin(memory: Tensor) -> None:
    """Register memory of the host with CUDA."""
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if error:
        raise RuntimeError(f"{memory.nbytes} bytes cannot be pinned: CUDA's error {error}")
