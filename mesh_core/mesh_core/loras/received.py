"""The folder of LoRAs that a worker received: bounded, named by their hashes, with a note beside each for people.

The network never names a path here: a file's name is the hash that its content proved to have.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from mesh_core.errors import ConfigError, LoraError, LoraMissing, LoraTooLarge
from mesh_core.loras.lora import Lora
from mesh_core.loras.stored import TensorFile, TensorOnDisk
from mesh_core.system.config import atomic_write
from mesh_core.system.file_stamp import FileStamp
from mesh_core.system.logs import logger
from mesh_core.system.remembered import Remembered

log = logger(__name__)

_MOST_FILES = 1000
"""That are kept, however small they are: each is looked at for each that is sought."""


class ReceivedLoras:
    """Thread-safe.

    Args:
        folder: made when the first LoRA arrives.
        limit: bytes that are kept; the least recently used LoRAs go first.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._in_use: dict[str, int] = {}
        self._lock = threading.RLock()

    def __contains__(self, path: Path) -> bool:
        """Whether ``path`` lies in the folder."""
        return path.parent == self.folder

    def files(self) -> list[Path]:
        """The files that are whole, sorted."""
        return sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []

    def path_of(self, id_: str) -> Path:
        """Where the LoRA of that hash lies, or would.

        Raises:
            LoraError: no hash, and so no file name.
        """
        if len(id_) != 64 or not set(id_) <= set("0123456789abcdef"):
            raise LoraError(f"{id_[:80]!r} is not the hash of a LoRA.", hint="one that mesh lora list shows")
        return self.folder / f"{id_}.safetensors"

    def name_of(self, path: Path) -> str:
        """What the sender called the LoRA in that file."""
        return str(self.note_of(path).get("name", path.stem))[:200]

    def note_of(self, path: Path) -> dict[str, Any]:
        """``name`` and ``family`` of the LoRA in that file, as its sender said; empty if nothing is noted."""
        try:
            note = json.loads(_note(path).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def used(self, path: Path) -> None:
        """The LoRA in that file was used just now."""
        with suppress(OSError):  # without a note it only goes earlier
            os.utime(_note(path))

    @property
    def nbytes(self) -> int:
        """Bytes of all that are whole."""
        return sum(size for _, size in self._sizes())

    @property
    def nbytes_in_use(self) -> int:
        """Bytes of those that cannot be removed now."""
        return sum(size for path, size in self._sizes() if path.stem in self._in_use)

    def _sizes(self) -> list[tuple[Path, int]]:
        found = []
        for path in self.files():
            with suppress(OSError):  # it went to make room
                found.append((path, path.stat().st_size))
        return found

    def make_room(self, size: int) -> None:
        """Remove the least recently used LoRAs until ``size`` more bytes, and one more file, are within the limits.

        Raises:
            LoraTooLarge: what is left is in use.
        """
        with self._lock:
            held = self._sizes()
            total, count = sum(length for _, length in held), len(held)
            if total + size <= self.limit and count < _MOST_FILES:
                return
            for path, length in sorted(held, key=lambda item: _last_used(item[0])):
                if total + size <= self.limit and count < _MOST_FILES:
                    return
                if path.stem not in self._in_use:
                    total, count = total - length, count - 1
                    _delete(path)
            if total + size > self.limit:
                raise LoraTooLarge(
                    f"This worker's LoRA library is full: {total / 1e6:.1f} of {self.limit / 1e6:.1f} MB are in use.",
                    hint="the same later, or a larger [loras] library in the worker's config.toml",
                )

    def add(self, draft: TensorFile, id_: str, name: str, family: str) -> None:
        """Take a verified file over; a reader sees all of it or nothing."""
        with self._lock:
            path, digests = self.path_of(id_), dict(draft.digests())
            os.replace(draft.path, path)
            Remembered("loras", {path: FileStamp.at(path)}).put(digests)
            try:
                atomic_write(_note(path), json.dumps({"name": name, "family": family}).encode())
            except ConfigError as error:
                log.warning("the name of a received LoRA is not kept: %s", error)

    def remove(self, id_: str) -> None:
        """Forget a LoRA.

        Raises:
            LoraMissing: it is not here, or belongs to the user.
            LoraError: a session uses it.
        """
        path = self.path_of(id_)
        with self._lock:
            if not path.is_file():
                raise LoraMissing(
                    f"No LoRA {id_[:12]} was received here.", hint="one that mesh lora list ADDRESS shows"
                )
            if id_ in self._in_use:
                raise LoraError(f"The LoRA {id_[:12]} is in use.", hint="the same when its session has ended")
            _delete(path)

    def hold(self, loras: Collection[Lora]) -> None:
        """Do not remove the files of these until `let_go`. Others' files are not touched anyway."""
        with self._lock:
            for stem in self._stems(loras):
                self._in_use[stem] = self._in_use.get(stem, 0) + 1

    def let_go(self, loras: Collection[Lora]) -> None:
        """Take one `hold` of the same LoRAs back."""
        with self._lock:
            for stem in self._stems(loras):
                self._in_use[stem] -= 1
                if not self._in_use[stem]:
                    del self._in_use[stem]

    def _stems(self, loras: Collection[Lora]) -> list[str]:
        sources = (s for lora in loras for p in lora.patches for s in p.tensors.values())
        return sorted(p.stem for p in {s.file.path for s in sources if isinstance(s, TensorOnDisk)} if p in self)


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _last_used(path: Path) -> int:
    note = _note(path)
    return (note if note.is_file() else path).stat().st_mtime_ns


def _delete(path: Path) -> None:
    with suppress(OSError):  # it is gone already
        Remembered("loras", {path: FileStamp.at(path)}).forget()
    for file in (path, _note(path)):
        file.unlink(missing_ok=True)
