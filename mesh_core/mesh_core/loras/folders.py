"""The LoRAs in folders that the user named: found by walking these, never by a path from elsewhere. Only read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mesh_core.model.folders import safetensors_among, walk


@dataclass(frozen=True)
class LoraFolders:
    """Folders, and single files, of the user."""

    roots: tuple[Path, ...]

    def files(self) -> Iterator[Path]:
        """The .safetensors files in all of them, each once. No link leads out of the folder that the user named."""
        seen: set[Path] = set()
        for path in (path for root in self.roots for path in _files(root)):
            if path not in seen:
                seen.add(path)
                yield path

    def name_of(self, path: Path) -> str:
        """The name of a file for people: relative to the folder that the user named, with forward slashes."""
        for root in self.roots:
            if path == root or root in path.parents:
                return path.name if path == root else path.relative_to(root).as_posix()
        return path.name


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for _, entries, _ in walk(root, links=False):
        yield from safetensors_among(entry for entry in entries if not entry.name.startswith("."))
