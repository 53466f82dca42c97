"""One writer at a time for a file that several processes change. Knows nothing of what the file holds."""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic, sleep, time
from types import TracebackType

from mesh_core.errors import ConfigError

_WAIT = 5.0
_STALE = 10.0


class FileLock:
    """Holds ``.NAME.lock`` beside a file; for changes that take milliseconds.

    A lock older than 10 seconds was left by a process that died and is taken over.
    """

    def __init__(self, path: Path) -> None:
        self._lock = path.with_name(f".{path.name}.lock")

    def __enter__(self) -> None:
        deadline = monotonic() + _WAIT
        while not self._take():
            if monotonic() > deadline:
                raise ConfigError(f"Another process keeps {self._lock} locked.", hint=f"delete {self._lock}")
            sleep(0.005)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.unlink(missing_ok=True)

    def _take(self) -> bool:
        try:
            self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            return True
        except (FileExistsError, PermissionError) as error:
            # Windows says "permission denied" while another process is deleting the lock.
            if isinstance(error, PermissionError) and not self._lock.exists() and os.name != "nt":
                raise ConfigError(f"Could not write to {self._lock.parent}: {error.strerror}.") from error
            self._drop_stale()
            return False
        except OSError as error:
            raise ConfigError(f"Could not write to {self._lock.parent}: {error.strerror}.") from error

    def _drop_stale(self) -> None:
        try:
            if time() - self._lock.stat().st_mtime > _STALE:
                self._lock.unlink(missing_ok=True)
        except OSError:
            return
