"""A worker's library and a host that sends to it piece by piece, without a network between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mesh_core import wire
from mesh_core.loras.library import LoraLibrary
from mesh_core.loras.lora import Lora
from mesh_core.loras.part import Part
from mesh_core.loras.received import ReceivedLoras
from mesh_core.model import fingerprint
from mesh_core.model.library import Checkpoint
from mesh_core.worker.lora_upload import Intake, Receiver

STEP = 1000
"""Bytes of a chunk in these tests."""


@dataclass
class Inbox:
    """A receiver, and a host that sends to it piece by piece."""

    library: LoraLibrary
    receiver: Receiver
    model: Checkpoint

    @classmethod
    def at(cls, folder: Path, model: Checkpoint) -> Inbox:
        library = LoraLibrary(ReceivedLoras(folder, 10**6))
        return cls(library, Receiver(library, lambda family, structure: model), model)

    def restarted(self) -> Inbox:
        return Inbox(self.library, Receiver(self.library, lambda family, structure: self.model), self.model)

    def offer(self, what: Lora, owner: str = "host", **changes: Any) -> int:
        part, lora = Part(what), what
        structure = fingerprint.structure(self.model.spec)
        message = wire.Offer(1, lora.id, part.digest(), part.nbytes, "klein", structure, lora.name)
        return finished(self.receiver.offer(owner, replace(message, **changes)))

    def chunk(self, lora: Lora, offset: int, data: bytes | None = None, owner: str = "host") -> int:
        data = Part(lora).read(offset, STEP) if data is None else data
        return finished(self.receiver.chunk(owner, wire.Chunk(2, lora.id, offset), memoryview(data)))

    def send(self, lora: Lora, owner: str = "host") -> None:
        have, size = self.offer(lora, owner), Part(lora).nbytes
        while have < size:
            have = self.chunk(lora, have, owner=owner)

    def kept(self) -> list[str]:
        return sorted(p.stem for p in self.library.received.folder.glob("*.safetensors"))

    def drafts(self) -> list[Path]:
        return list((self.library.received.folder / "incoming").glob("*"))


def finished(pieces: Intake) -> int:
    """What work in pieces says at its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return int(end.value)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])
