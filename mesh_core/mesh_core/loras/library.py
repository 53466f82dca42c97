"""The LoRAs that a worker has: those it received, in a folder of bounded size, and those in its user's folders.

Found by content, or by the name that `listing` gives. The network never names a path: received files are named after
their hash, and the user's are only ever looked up among those that a walk of the folders found.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mesh_core.errors import CheckpointError, ConfigError, LoraError, LoraMissing, LoraTooLarge
from mesh_core.loras.part import read_part
from mesh_core.loras.patch import Lora
from mesh_core.loras.read import read_lora
from mesh_core.loras.tensors import StoredTensor, TensorFile
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import MAX_DEPTH, read_header
from mesh_core.model.library import Checkpoint
from mesh_core.system.config import Settings, atomic_write, data_dir
from mesh_core.system.remembered import Remembered

log = logging.getLogger(__name__)

_Stamp = tuple[int, int]


class Shelf:
    """Thread-safe.

    Args:
        folder: of received LoRAs; made when the first arrives.
        limit: bytes of them that are kept; the least recently used go first.
        roots: the user's folders and files; only read.
    """

    def __init__(self, folder: Path, limit: int, roots: Sequence[Path] = ()) -> None:
        self.folder, self.limit, self.roots = folder, limit, tuple(roots)
        self._parsed: dict[tuple[Path, str], tuple[_Stamp, Lora]] = {}
        self._in_use: dict[str, int] = {}
        self._lock = threading.RLock()

    # Finding

    def find(self, id_: str, outline: str, checkpoint: Checkpoint, parameters: Collection[str]) -> Lora | None:
        """The LoRA that does exactly this to ``parameters``, from any file that contains it; None if none does."""
        direct = self.path_of(id_)
        for path in [*([direct] if direct.is_file() else []), *self._files()]:
            lora = self._parse(path, checkpoint)
            if lora is None:
                continue
            part = lora.restricted(parameters)
            if part and part.outline == outline and part.id == id_:
                if path.parent == self.folder:
                    with suppress(OSError):  # it counts as used; without a note it only goes earlier
                        os.utime(path.with_suffix(".json"))
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
            label = self._label(path)
            if name in (label, Path(label).stem, Path(label).name):
                found.append((label, path))
        if not found and len(name) >= 8 and set(name) <= set("0123456789abcdef"):
            for path in self._files():
                lora = self._parse(path, checkpoint)
                if lora is not None and lora.id.startswith(name):
                    found.append((self._label(path), path))
        if len(found) != 1:
            raise _no_such(name, [label for label, _ in found], [self._label(p) for p in self._files()])
        path = found[0][1]
        whole = read_part(path, checkpoint.spec) if path.parent == self.folder else read_lora(path, checkpoint)
        return whole.restricted(parameters)

    def tensors(self, hashes: Collection[str], checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """Tensors of received LoRAs for that model whose hash is among ``hashes``, by hash."""
        found: dict[str, StoredTensor] = {}
        for path in self._received():
            lora = self._parse(path, checkpoint)
            for source in (s for p in (lora.patches if lora is not None else ()) for s in p.tensors.values()):
                with suppress(LoraError):  # the file went to make room for another
                    if isinstance(source, StoredTensor) and (digest := source.digest()) in hashes:
                        found[digest] = source
        return found

    def listing(self) -> list[dict[str, Any]]:
        """All LoRAs as plain values: name, bytes, hash where it is known, what their metadata says. No paths."""
        listed = []
        for path in self._files():
            try:
                header = read_header(path)
                size = path.stat().st_size
            except (CheckpointError, OSError) as error:
                log.warning("%s", error)
                continue
            received = path.parent == self.folder
            note = self._note(path.stem) if received else {}
            listed.append(
                {
                    "name": self._label(path),
                    "bytes": size,
                    "id": path.stem if received else "",
                    "received": received,
                    "family": str(note.get("family", ""))[:64],
                    **describe(header.metadata),
                }
            )
        return listed

    # Keeping

    def path_of(self, id_: str) -> Path:
        """Where the received LoRA of that hash lies, or would.

        Raises:
            LoraError: no hash, and so no file name.
        """
        if len(id_) != 64 or not set(id_) <= set("0123456789abcdef"):
            raise LoraError(f"{id_[:80]!r} is not the hash of a LoRA.")
        return self.folder / f"{id_}.safetensors"

    def make_room(self, size: int) -> None:
        """Remove the least recently used received LoRAs until ``size`` more bytes are within the limit.

        Raises:
            LoraTooLarge: that cannot be, or what is left is in use.
        """
        if size > self.limit:
            raise LoraTooLarge(
                f"A LoRA of {size / 1e6:.1f} MB is over this worker's library of {self.limit / 1e6:.1f} MB.",
                hint="a larger [loras] library in the worker's config.toml, or the file in its LoRA folder",
            )
        with self._lock:
            held = sorted(self._received(), key=_last_used)
            total = sum(p.stat().st_size for p in held)
            for path in held:
                if total + size <= self.limit:
                    return
                if path.stem not in self._in_use:
                    total -= path.stat().st_size
                    self._delete(path)
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
            Remembered("loras", [path]).put(digests)
            try:
                note = json.dumps({"name": name, "family": family}).encode()
                atomic_write(self.folder / f"{id_}.json", note)
            except ConfigError as error:
                log.warning("the name of a received LoRA is not kept: %s", error)

    def remove(self, id_: str) -> None:
        """Forget a received LoRA.

        Raises:
            LoraMissing: it is not here, or belongs to the user.
            LoraError: a session uses it.
        """
        path = self.path_of(id_)
        with self._lock:
            if not path.is_file():
                raise LoraMissing(f"No LoRA {id_[:12]} was received here.", hint="mesh lora list")
            if id_ in self._in_use:
                raise LoraError(f"The LoRA {id_[:12]} is in use.", hint="the same when its session has ended")
            self._delete(path)

    def hold(self, loras: Collection[Lora]) -> None:
        """Do not remove the files of these until `let_go`."""
        with self._lock:
            for stem in self._stems(loras):
                self._in_use[stem] = self._in_use.get(stem, 0) + 1

    def let_go(self, loras: Collection[Lora]) -> None:
        with self._lock:
            for stem in self._stems(loras):
                self._in_use[stem] -= 1
                if not self._in_use[stem]:
                    del self._in_use[stem]

    def _stems(self, loras: Collection[Lora]) -> list[str]:
        sources = (s for lora in loras for p in lora.patches for s in p.tensors.values())
        paths = {s.file.path for s in sources if isinstance(s, StoredTensor)}
        return sorted(p.stem for p in paths if p.parent == self.folder)

    def _delete(self, path: Path) -> None:
        for file in (path, path.with_suffix(".json")):
            file.unlink(missing_ok=True)

    def _received(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []

    def _files(self) -> Iterator[Path]:
        yield from self._received()
        seen: set[Path] = set()
        for root in self.roots:
            for path in walk(root):
                if path not in seen:
                    seen.add(path)
                    yield path

    def _label(self, path: Path) -> str:
        """The name of a file for people: relative to its root, with forward slashes; what the sender called it if
        it was received."""
        if path.parent == self.folder:
            return str(self._note(path.stem).get("name", path.stem))[:200]
        for root in self.roots:
            if path == root or root in path.parents:
                return path.name if path == root else path.relative_to(root).as_posix()
        return path.name

    def _note(self, id_: str) -> dict[str, Any]:
        try:
            note = json.loads((self.folder / f"{id_}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def _parse(self, path: Path, checkpoint: Checkpoint) -> Lora | None:
        """The LoRA of a file for that model, None if it has none; only headers are read, and each once."""
        try:
            found = path.stat()
            stamp, key = (found.st_size, found.st_mtime_ns), (path, fingerprint.structure(checkpoint.spec))
            with self._lock:
                known = self._parsed.get(key)
            if known is not None and known[0] == stamp:
                return known[1]
            lora = self._read(path, checkpoint)
        except (LoraError, CheckpointError, OSError) as error:
            log.debug("%s is no LoRA for %s: %s", path, checkpoint.spec.family, error)
            return None
        with self._lock:
            self._parsed[key] = (stamp, lora)
        return lora

    def _read(self, path: Path, checkpoint: Checkpoint) -> Lora:
        if path.parent == self.folder:
            return read_part(path, checkpoint.spec, self._label(path))
        return read_lora(path, checkpoint, self._label(path))


def own_shelf(settings: Settings, more: Sequence[Path] = ()) -> Shelf:
    """This user's LoRAs on this machine: received ones, and those in the folders of the settings and in ``more``."""
    folders = [*(Path(f).expanduser() for f in settings.loras.folders), *more]
    return Shelf(data_dir() / "loras", settings.loras.library, folders)


def walk(root: Path) -> Iterator[Path]:
    """The .safetensors files under ``root``, sorted. Links that lead out of it are left out and logged."""
    if root.is_file():
        yield root
        return
    home = root.resolve()
    pending: list[tuple[Path, int]] = [(root, 0)]
    while pending:
        folder, depth = pending.pop(0)
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            log.warning("%s is left out: %s", folder, error.strerror or error)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            real = entry.resolve()
            if home != real and home not in real.parents:
                log.warning("%s is left out: it leads out of the folder", entry)
            elif entry.is_dir() and depth < MAX_DEPTH and not entry.is_symlink():
                pending.append((entry, depth + 1))
            elif entry.suffix == ".safetensors" and entry.is_file():
                yield entry


def _last_used(path: Path) -> int:
    note = path.with_suffix(".json")
    return (note if note.is_file() else path).stat().st_mtime_ns


def describe(metadata: Any) -> dict[str, Any]:
    """What a LoRA's metadata tells people: title, base model, words that trigger it. Bounded."""

    def text(*keys: str) -> str:
        return next((str(metadata[k])[:200] for k in keys if metadata.get(k)), "")

    words = text("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words")
    if not words:
        words = _frequent_tags(metadata.get("ss_tag_frequency", ""))
    return {
        "title": text("modelspec.title", "ss_output_name"),
        "base": text("modelspec.architecture", "ss_base_model_version", "base_model"),
        "trigger": words,
    }


def _frequent_tags(text: str, most: int = 5) -> str:
    try:
        folders = json.loads(text) if text else {}
        counts: dict[str, int] = {}
        for tags in folders.values():
            for tag, n in tags.items():
                counts[str(tag)[:60]] = counts.get(str(tag)[:60], 0) + int(n)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ""
    return ", ".join(sorted(counts, key=lambda t: -counts[t])[:most])


def _no_such(name: str, several: list[str], known: list[str]) -> LoraMissing:
    if several:
        return LoraMissing(
            f"The name {name[:100]!r} stands for {len(several)} LoRAs: {', '.join(several[:5])}.",
            hint="its whole name, or its hash",
        )
    listed = ", ".join(known[:8]) or "none"
    return LoraMissing(f"There is no LoRA {name[:100]!r} here. There are: {listed}.", hint="mesh lora list ADDRESS")
