"""The LoRAs that a worker can use: those that it received, and those in its user's folders.

Found by what they do, or by the name that `LoraLibrary.listing` gives. The network never names a path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mesh_core.errors import CheckpointError, LoraError, LoraMissing
from mesh_core.loras.bounds import read_lora_header
from mesh_core.loras.facts import facts_for_people
from mesh_core.loras.folders import LoraFolders
from mesh_core.loras.lora import Lora
from mesh_core.loras.part import read_part
from mesh_core.loras.read import read_lora
from mesh_core.loras.received import ReceivedLoras
from mesh_core.loras.stamped import Stamped
from mesh_core.loras.stored import TensorOnDisk
from mesh_core.model import fingerprint
from mesh_core.model.library import Checkpoint
from mesh_core.system.config import Settings, data_dir
from mesh_core.system.file_stamp import FileStamp
from mesh_core.system.logs import logger

log = logger(__name__)

_MOST_KEPT = 100_000
"""Patches of all LoRAs that are kept in memory; one takes about 2 kB."""

_MOST_FACTS = 10_000
"""Files of which it is kept what they say of themselves."""


class LoraLibrary:
    """Thread-safe.

    Args:
        received: the folder of LoRAs that hosts sent; the only one that is written to.
        folders: the user's own.
    """

    def __init__(self, received: ReceivedLoras, folders: Sequence[Path] = ()) -> None:
        self.received = received
        self._folders = LoraFolders(tuple(folders))
        self._parsed = Stamped[tuple[Path, str], Lora | None](_MOST_KEPT, lambda x: 1 + (len(x.patches) if x else 0))
        self._facts = Stamped[Path, dict[str, str]](_MOST_FACTS)

    def find(self, id_: str, outline: str, checkpoint: Checkpoint, parameters: Collection[str]) -> Lora | None:
        """The LoRA that does exactly this to ``parameters``, from any file that contains it; None if none does.

        Args:
            id_, outline: of its part for ``parameters``, see `Lora.id` and `Lora.outline`.
        """
        direct = self.received.path_of(id_)
        for path in [*([direct] if direct.is_file() else []), *self._files()]:
            lora = self._parse(path, checkpoint)
            if lora is None:
                continue
            part = lora.restricted(parameters)
            # The outline costs no reading: what is another LoRA is not hashed.
            if part and part.outline == outline and part.id == id_:
                if path in self.received:
                    self.received.used(path)
                return part
        return None

    def named(self, name: str, checkpoint: Checkpoint, parameters: Collection[str]) -> Lora:
        """The LoRA whose listed name, or the start of whose hash, is ``name``.

        Raises:
            LoraMissing: none, or more than one.
            LoraError: the file cannot be used with this model.
        """
        found: list[tuple[str, Path]] = []
        for path in self._files():
            label = self._name_of(path)
            if name in (label, Path(label).stem, Path(label).name):
                found.append((label, path))
        if not found and len(name) >= 8 and set(name) <= set("0123456789abcdef"):
            for path in self._files():
                lora = self._parse(path, checkpoint)
                if lora is not None and lora.id.startswith(name):
                    found.append((self._name_of(path), path))
        if len(found) != 1:
            raise _no_such(name, [label for label, _ in found], [self._name_of(p) for p in self._files()])
        path = found[0][1]
        whole = read_part(path, checkpoint.spec) if path in self.received else read_lora(path, checkpoint)
        return whole.restricted(parameters)

    def tensors(self, hashes: Collection[str], checkpoint: Checkpoint) -> dict[str, TensorOnDisk]:
        """Tensors of received LoRAs for that model whose hash is among ``hashes``, by hash."""
        found: dict[str, TensorOnDisk] = {}
        for path in self.received.files():
            lora = self._parse(path, checkpoint)
            for source in (s for p in (lora.patches if lora is not None else ()) for s in p.tensors.values()):
                with suppress(LoraError):  # the file went to make room for another
                    if isinstance(source, TensorOnDisk) and (digest := source.digest()) in hashes:
                        found[digest] = source
        return found

    def listing(self) -> list[dict[str, Any]]:
        """All LoRAs as plain values: name, bytes, hash where it is known, what their metadata says. No paths."""
        listed = []
        for path in self._files():
            try:
                stamp = FileStamp.at(path)
                facts = self._facts.get(path, stamp, partial(_facts, path))
            except (CheckpointError, LoraError, OSError) as error:
                log.warning("%s", error)
                continue
            received = path in self.received
            note = self.received.note_of(path) if received else {}
            listed.append(
                {
                    "name": self._name_of(path),
                    "bytes": stamp.size,
                    "id": path.stem if received else "",
                    "received": received,
                    "family": str(note.get("family", ""))[:64],
                    **facts,
                }
            )
        return listed

    def _files(self) -> Iterator[Path]:
        yield from self.received.files()
        yield from self._folders.files()

    def _name_of(self, path: Path) -> str:
        return self.received.name_of(path) if path in self.received else self._folders.name_of(path)

    def _parse(self, path: Path, checkpoint: Checkpoint) -> Lora | None:
        """The LoRA of a file for that model, None if it has none; only headers are read, and each once."""
        try:
            key = path, fingerprint.structure(checkpoint.spec)
            return self._parsed.get(key, FileStamp.at(path), lambda: self._read(path, checkpoint))
        except OSError as error:
            log.debug("%s cannot be read: %s", path, error)
            return None

    def _read(self, path: Path, checkpoint: Checkpoint) -> Lora | None:
        try:
            if path in self.received:
                return read_part(path, checkpoint.spec, self._name_of(path))
            return read_lora(path, checkpoint, self._name_of(path))
        except (LoraError, CheckpointError) as error:
            log.debug("%s is no LoRA for %s: %s", path, checkpoint.spec.family, error)
            return None


def _facts(path: Path) -> dict[str, str]:
    return facts_for_people(read_lora_header(path).metadata)


def own_library(settings: Settings, more: Sequence[Path] = ()) -> LoraLibrary:
    """This user's LoRAs on this machine: received ones, and those in the folders of the settings and in ``more``."""
    folders = [*(Path(f).expanduser() for f in settings.loras.folders), *more]
    return LoraLibrary(ReceivedLoras(data_dir() / "loras", settings.loras.library), folders)


def _no_such(name: str, several: list[str], known: list[str]) -> LoraMissing:
    if several:
        return LoraMissing(
            f"The name {name[:100]!r} stands for {len(several)} LoRAs: {', '.join(several[:5])}.",
            hint="its whole name, or its hash",
        )
    listed = ", ".join(known[:8]) or "none"
    return LoraMissing(
        f"There is no LoRA {name[:100]!r} here. There are: {listed}.",
        hint="the path of a file, or a name that mesh lora list shows; of a worker: mesh lora list ADDRESS",
    )
