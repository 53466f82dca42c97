"""Walking the folders that a user names: how deep, in which order, behind which links. Reads no file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mesh_core.system.logs import logger

log = logger(__name__)

MAX_DEPTH = 4
"""How deep below the folder that the user named files are looked for."""

_GGUF = ".gguf"

_OTHER_FORMATS = (".ckpt", ".pt", ".pth")
"""Weights of formats that are not read: whoever names their folder may expect them, so that they are told."""


def walk(root: Path, *, links: bool) -> Iterator[tuple[Path, list[Path], list[Path]]]:
    """Each folder under ``root``, itself first: the folder, all its entries, and those that are walked next.

    Entries are sorted, and folders are walked depth first. As with `os.walk`, what is taken out of the last list is
    not walked. Hidden folders never are; a folder that cannot be read is logged and left out.

    Args:
        links: follow links to folders, to each real folder once. Otherwise they are not followed, and entries that
            lead out of ``root`` are logged and left out.
    """
    home, seen = root.resolve(), set[Path]()
    pending = [(root, 0)]
    while pending:
        folder, depth = pending.pop()
        real = folder.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            log.warning("%s is left out: %s", folder, error.strerror or error)
            continue
        if not links:
            entries = [entry for entry in entries if _inside(entry, home)]
        folders = [e for e in entries if e.is_dir() and not e.name.startswith(".") and (links or not e.is_symlink())]
        yield folder, entries, folders
        if depth < MAX_DEPTH:
            pending += ((below, depth + 1) for below in reversed(folders))


def safetensors_among(entries: Iterable[Path]) -> list[Path]:
    """Those of ``entries`` that are .safetensors files."""
    return [entry for entry in entries if entry.suffix == ".safetensors" and entry.is_file()]


def find_checkpoints(root: str | os.PathLike[str]) -> Iterator[Path]:
    """Files and folders under ``root`` (itself included) that `read_header` may understand, in sorted order.

    Weights of other formats are given too; `read_header` says what they are. Pipeline and model folders are given
    once, as folders, and GGUF files in them besides. Links are followed, each real folder once.
    """
    root = Path(root)
    if root.is_file():
        yield root
        return
    for folder, entries, folders in walk(root, links=True):
        names, weights = {entry.name for entry in entries}, safetensors_among(entries)
        suffixes: tuple[str, ...] = (_GGUF,)
        if "model_index.json" in names or ("config.json" in names and weights):
            folders.clear()
            yield folder
            weights = []
        else:
            suffixes += _OTHER_FORMATS
        yield from (e for e in entries if e in weights or (e.suffix.lower() in suffixes and e.is_file()))


def _inside(entry: Path, home: Path) -> bool:
    real = entry.resolve()
    inside = home == real or home in real.parents
    if not inside:
        log.warning("%s is left out: it leads out of the folder", entry)
    return inside
