"""What is costly to compute of files and remembered on disk, valid while their stamps stay the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from mesh_core.errors import ConfigError
from mesh_core.system.config import atomic_write, cache_dir
from mesh_core.system.file_stamp import FileStamp
from mesh_core.system.logs import logger

log = logger(__name__)


class Remembered:
    """One value per (kind, files, salt).

    Args:
        kind: a folder of the cache, for example ``"fingerprints"``.
        files: with the stamps that they had when the value was computed, or must have for it to be used.
        salt: what the value depends on beside the files.
    """

    def __init__(self, kind: str, files: Mapping[Path, FileStamp], salt: str = "") -> None:
        self._kind = kind
        self._state = json.dumps([salt, [[str(f.resolve()), *stamp.plain()] for f, stamp in sorted(files.items())]])
        self._path = cache_dir() / kind / f"{blake3(self._state.encode()).hexdigest()[:32]}.json"

    def get(self) -> Any:
        """The value, None if it is not remembered or the files changed. Whoever asks checks its shape."""
        try:
            stored = json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return stored.get("value") if isinstance(stored, dict) and stored.get("state") == self._state else None

    def forget(self) -> None:
        """Remember nothing of these files any more."""
        with suppress(OSError):  # a cache that cannot be written was reported when it was
            self._path.unlink(missing_ok=True)

    def put(self, value: Any) -> None:
        """Remember ``value``, which is plain; where that is not possible, a warning says so."""
        try:
            atomic_write(self._path, json.dumps({"state": self._state, "value": value}).encode())
        except ConfigError as error:
            log.warning("%s are not remembered and will be computed again: %s", self._kind, error)
