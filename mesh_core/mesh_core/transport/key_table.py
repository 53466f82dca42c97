"""Tables of keys on disk that several processes read and change. Knows files; nothing of what a key may do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from mesh_core.errors import ConfigError
from mesh_core.system.config import atomic_write
from mesh_core.system.private import check_private

_WAIT = 5.0
"""Seconds; a change takes milliseconds."""


class KeyTable:
    """Rows of one dataclass in a JSON file, by one of their fields.

    Every method raises ConfigError where the file cannot be read, or other users may write it; those that change it
    also where it cannot be written or another process keeps it locked.
    """

    def __init__(self, path: Path, kind: type[Any], by: str) -> None:
        self._path, self._kind, self._by = path, kind, by
        self._stamp: tuple[int, ...] | None = None
        self._rows: dict[str, Any] = {}

    def rows(self) -> Mapping[str, Any]:
        """What the file holds now; read only when it changed."""
        stamp = self._look()
        if stamp != self._stamp:
            self._rows = self._read() if stamp else {}
            self._stamp = stamp
        return self._rows

    def put(self, row: Any) -> None:
        """Write a row; replaces the one of the same key."""
        with _locked(self._path):
            self._write({**self._fresh(), getattr(row, self._by): row})

    def remove(self, key: str) -> Any:
        """Take a row out and return it; None if it was not there. Of two that remove it, one gets it."""
        with _locked(self._path):
            rows = self._fresh()
            row = rows.pop(key, None)
            if row is not None:
                self._write(rows)
        return row

    def _look(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(self._path, error) from error
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino)

    def _fresh(self) -> dict[str, Any]:
        return self._read() if self._path.exists() else {}

    def _read(self) -> dict[str, Any]:
        check_private(self._path)
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Any])["rows"]
            if unknown := {name for row in found for name in row} - {field.name for field in fields(self._kind)}:
                # Written by a newer version: what is not understood here would be lost with the next change.
                raise ValueError(f"unknown field {min(unknown)!r}")
            rows = [msgspec.convert(row, self._kind) for row in found]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise unreadable(self._path, error) from error
        return {getattr(row, self._by): row for row in rows}

    def _write(self, rows: Mapping[str, Any]) -> None:
        content = {"version": 1, "rows": [asdict(row) for row in rows.values()]}
        atomic_write(self._path, msgspec.json.format(msgspec.json.encode(content), indent=1), private=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time for the file at ``path``. A lock ends with the process that holds it, whatever is left of
    the lock's own file."""
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, mode=0o600)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire(timeout=_WAIT, poll_interval=0.005)
    except Timeout as error:
        raise ConfigError(
            f"Another process keeps {path} locked.", hint="end the mesh command or worker that hangs, then try again"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"Could not write to {path.parent}: {error.strerror or error}.",
            hint="set MESH_HOME to a folder that you may write to",
        ) from error
    try:
        yield
    finally:
        if os.name != "nt":
            # Whoever waits with this file open sees that it has no name any more, and opens the next one.
            file.unlink(missing_ok=True)
        lock.release()


def unreadable(path: Path, error: Exception) -> ConfigError:
    """What to tell of a file of keys that is damaged: it is never replaced."""
    return ConfigError(
        f"Could not read {path}: {type(error).__name__}: {error}.", hint=f"restore it, or delete {path} to start anew"
    )
