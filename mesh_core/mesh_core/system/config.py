"""Where things live and what the user set. Knows files and numbers; nothing of models, networks or plugins.

Places follow the platform's conventions; the environment variable MESH_HOME puts all of them under one folder.
Settings are read from ``config.toml`` in the configuration folder; every one has a default.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from mesh_core.errors import ConfigError
from mesh_core.system.private import check_private

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_APP = "comfyui-mesh"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", re.IGNORECASE)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def config_dir() -> Path:
    """Folder of settings, keys and known workers. May not exist yet."""
    return _place("config", platformdirs.user_config_path)


def cache_dir() -> Path:
    """Folder of what can be made again. May not exist yet."""
    return _place("cache", platformdirs.user_cache_path)


def data_dir() -> Path:
    """Folder of what was received and is kept, such as LoRAs. May not exist yet."""
    return _place("data", platformdirs.user_data_path)


def _place(name: str, platform_path: Any) -> Path:
    home = os.environ.get("MESH_HOME")
    return Path(home).expanduser().absolute() / name if home else Path(platform_path(_APP, appauthor=False))


_MOST_BYTES = 1 << 60


def parse_bytes(text: str, least: int = 0) -> int:
    """Bytes from ``"1073741824"``, ``"20 GiB"`` or ``"1.5GB"``; KB, MB ... count in 1000s, KiB, MiB ... in 1024s.

    Raises:
        ConfigError: the text is no size, or less than ``least`` bytes, or more than any machine has.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size.", hint="for example 20GiB, 800MB or a number of bytes")
    unit = (match[2] or "B").upper()
    base = 1024 if "I" in unit else 1000
    size = float(match[1]) * base ** _UNITS[unit.rstrip("B").rstrip("I")]
    if not least <= size <= _MOST_BYTES:
        raise ConfigError(f"{text[:40]!r} is too {'large' if size > least else 'small'}.", hint="for example 20GiB")
    return int(size)


def in_bytes(size: float) -> str:
    """A number of bytes for people, with three digits or so: ``"12.3 GB"``, ``"520 KB"``. Counts in 1000s."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if size >= u), (1.0, "bytes"))
    number = size / unit
    return f"{number:.0f} {name}" if unit == 1.0 or number >= 100 else f"{number:.{1 if number >= 10 else 2}f} {name}"


@dataclass(frozen=True)
class WorkerSettings:
    """What `mesh serve` offers.

    Attributes:
        bind: address to listen on; the default is reached from this machine only.
        port: TCP port; 0 lets the system choose.
        memory_budget: bytes of weights kept on the device; None takes what the device has free.
        constants_cache: bytes of generation constants kept for all sessions together.
        step_memory: bytes that one step may take beside the weights; None takes what the device has free.
        orphaned_after: seconds of silence of a host after which its running step is stopped.
        idle_after: seconds without use after which a session is forgotten; its host opens it again when it returns.
        yields_after: seconds without use after which a session is forgotten if another needs its memory.
    """

    bind: str = "127.0.0.1"
    port: int = field(default=7777, metadata={"least": 0, "most": 65535})
    memory_budget: int | None = field(default=None, metadata={"bytes": True, "least": 1})
    constants_cache: int = field(default=1 << 30, metadata={"bytes": True, "least": 0})
    step_memory: int | None = field(default=None, metadata={"bytes": True, "least": 1})
    orphaned_after: float = field(default=10.0, metadata={"least": 0.1})
    idle_after: float = field(default=3600.0, metadata={"least": 1.0})
    yields_after: float = field(default=60.0, metadata={"least": 0.1})


@dataclass(frozen=True)
class Deadlines:
    """Seconds until a request is given up; ``reconnect``: how long a lost worker is waited for. A worker computes no
    step for longer than its own ``step``."""

    connect: float = field(default=10.0, metadata={"least": 0.1})
    load: float = field(default=900.0, metadata={"least": 0.1})
    step: float = field(default=300.0, metadata={"least": 0.1})
    reconnect: float = field(default=120.0, metadata={"least": 0.0})


@dataclass(frozen=True)
class Heartbeat:
    """How a worker that is gone is told from a slow one: a ping every ``interval`` seconds, lost after ``lost_after``
    seconds of silence."""

    interval: float = field(default=1.0, metadata={"least": 0.05})
    lost_after: float = field(default=4.0, metadata={"least": 0.1})


@dataclass(frozen=True)
class Loras:
    """How much a worker takes in, and what a host sends.

    Attributes:
        library: bytes of received LoRAs kept on disk; the least recently used ones go first.
        largest_sent: bytes of one LoRA that a host sends without being told to.
        policy: what a host does with a LoRA for a worker's blocks, see `mesh_core.loras.policy`: ``default``,
            ``always-send``, ``never-send``, ``worker-only`` or ``local-only``.
        folders: of the user's own LoRAs on this machine, which are then known by name.
    """

    library: int = field(default=8 << 30, metadata={"bytes": True, "least": 0})
    largest_sent: int = field(default=256 << 20, metadata={"bytes": True, "least": 0})
    policy: str = field(
        default="default", metadata={"one_of": ("default", "always-send", "never-send", "worker-only", "local-only")}
    )
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComfySettings:
    """``hosts``: names by which ComfyUI is reached, other than an address and names of the local network; one that
    starts with a dot stands for all that end so. Pages of other names cannot use the mesh's settings there."""

    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class PluginSettings:
    """``disabled``: names of plugins, as `mesh plugins` shows them, that are not imported."""

    disabled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """All settings; one table of ``config.toml`` per attribute."""

    worker: WorkerSettings = field(default_factory=WorkerSettings)
    deadlines: Deadlines = field(default_factory=Deadlines)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    loras: Loras = field(default_factory=Loras)
    comfy: ComfySettings = field(default_factory=ComfySettings)
    plugins: PluginSettings = field(default_factory=PluginSettings)

    @classmethod
    def load(cls, path: Path | None = None) -> Settings:
        """Defaults, overridden by ``path`` (by default ``config.toml`` in `config_dir`, if it exists).

        Plugins named in the environment variable MESH_DISABLE_PLUGINS, separated by commas, are disabled too.

        Raises:
            ConfigError: a file that was named does not exist, is not TOML, or holds a key or value that is not
                accepted; names file and key. Or others may write the user's own.
        """
        file = path or config_dir() / "config.toml"
        if path is None:
            check_private(file)
        settings = _settings(file) if path is not None or file.exists() else cls()
        extra = tuple(name.strip() for name in os.environ.get("MESH_DISABLE_PLUGINS", "").split(",") if name.strip())
        return replace(settings, plugins=PluginSettings((*settings.plugins.disabled, *extra)))


def _settings(file: Path) -> Settings:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"Could not read the settings {file}: {error.strerror}.", hint="check the path, and that you may read it"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} is not TOML: {error}.", hint="correct it, or delete it to use the defaults"
        ) from error
    tables = {f.name: f.default_factory for f in fields(Settings)}
    _check_known(content, tables, file, "")
    read: dict[str, Any] = {}
    for name, table in content.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"{file}: {name} is a table.", hint=f"[{name}] on a line of its own")
        read[name] = _table(tables[name], table, file, name)  # type: ignore[arg-type]
    settings = Settings(**read)
    if settings.heartbeat.lost_after <= settings.heartbeat.interval:
        raise ConfigError(
            f"{file}: heartbeat.lost_after must be longer than heartbeat.interval ({settings.heartbeat.interval} s).",
            hint="a larger lost_after or a smaller interval",
        )
    return settings


def _table(kind: type[T], table: Mapping[str, Any], file: Path, where: str) -> T:
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    _check_known(table, known, file, f"{where}.")
    values = {}
    for key, value in table.items():
        try:
            values[key] = _value(value, known[key].default, known[key].metadata)
        except (ConfigError, ValueError) as error:
            reason = error.message if isinstance(error, ConfigError) else str(error)
            hint = error.hint if isinstance(error, ConfigError) else "correct it, or take it out to use the default"
            raise ConfigError(f"{file}: {where}.{key} = {value!r}: {reason}", hint=hint) from error
    return kind(**values)


def _value(value: Any, default: Any, rules: Mapping[str, Any]) -> Any:
    """``value`` as a setting of the kind that ``default`` is; ValueError says what is accepted instead."""
    if isinstance(default, str):
        if not isinstance(value, str):
            raise ValueError("text is expected")
        if value not in rules.get("one_of", (value,)):
            raise ValueError(f"one of {', '.join(rules['one_of'])} is expected")
        return value
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError("a list of texts is expected")
        return tuple(value)
    if rules.get("bytes") and isinstance(value, str):
        value = parse_bytes(value)
    wanted = (int, float) if isinstance(default, float) else (int,)
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ValueError("a number is expected" if isinstance(default, float) else "a whole number is expected")
    least, most = rules.get("least", value), rules.get("most", value)
    if not least <= value <= most:
        bounds = f"from {least} to {most}" if "most" in rules else f"of at least {least}"
        raise ValueError(f"a number {bounds} is expected")
    return float(value) if isinstance(default, float) else value


def _check_known(given: Mapping[str, Any], known: Mapping[str, Any], file: Path, where: str) -> None:
    for key in given:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            raise ConfigError(
                f"{file}: {where}{key} is no setting.",
                hint=f"{where}{close[0]}" if close else f"one of {', '.join(f'{where}{k}' for k in known)}",
            )


_OURS = "free some space, or set MESH_HOME to a folder that you may write to"


def atomic_write(path: Path, content: bytes, *, private: bool = False, hint: str = _OURS) -> None:
    """Write a file so that a reader sees all of the old or all of the new content; makes missing folders.

    Args:
        private: readable by this user only, where the system has such permissions; on Windows the permissions of
            the folder hold.
        hint: of the error; by default for the mesh's own files.

    Raises:
        ConfigError: the file cannot be written; names it and the reason.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        path.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
        with os.fdopen(os.open(draft, flags, 0o600 if private else 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):  # the folder itself may be what is wrong
            draft.unlink()
        raise ConfigError(f"Could not write {path}: {error.strerror or error}.", hint=hint) from error
