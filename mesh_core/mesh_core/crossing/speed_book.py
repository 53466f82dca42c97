"""The speeds of this machine's codecs: measured once, and kept for later runs.

Knows no links and no sessions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from threading import Lock
from time import time
from typing import Any

import psutil
import torch

from mesh_codec.base import Codec
from mesh_codec.errors import CodecError
from mesh_codec.qualities import EXACT, TYPICAL
from mesh_codec.raw import RawCodec
from mesh_core import __version__
from mesh_core.crossing.codec_speed import COPYING, CodecSpeed, read_speed
from mesh_core.crossing.codec_timing import time_codec
from mesh_core.errors import ConfigError
from mesh_core.system.config import atomic_write, cache_dir
from mesh_core.system.device import label
from mesh_core.system.logs import logger

log = logger(__name__)

_KEPT, _KEPT_IF_BUSY = 30 * 86400, 600
"""Seconds after which a measurement is made again; sooner if the machine had more to do than processors."""

_REPRESENTATIVE = (TYPICAL, EXACT)
_DTYPE = torch.bfloat16
"""Qualities and element type at which a machine tells others its speeds."""


class SpeedBook:
    """The speeds of this machine's codecs on one device. Any thread may use it.

    Args:
        folder: where measurements are kept; by default in the cache folder.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self._device = device
        self._folder = folder or cache_dir() / "codec-speed"
        self._known: dict[str, CodecSpeed | None] = {}
        self._alike: dict[tuple[str, str], CodecSpeed] = {}
        self._pending: set[str] = set()
        self._named: dict[tuple[Codec, str, torch.dtype, int], tuple[str, tuple[str, str]]] = {}
        self._lock = Lock()
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="codec-speed")

    def look(self, codec: Codec, settings: Mapping[str, Any], dtype: torch.dtype) -> CodecSpeed | None:
        """The speed of ``codec`` as far as it is known, at once; what is not known is measured meanwhile.

        None if nothing is known yet, or it cannot code at all here. Until these very settings are measured, others of
        the same engine stand for them.
        """
        if type(codec) is RawCodec:
            return COPYING
        with self._lock:
            key, kind = self._names(codec, settings, dtype)
            if key in self._known:
                return self._known[key]
            if not self._closed and key not in self._pending and not self._recall(key, kind):
                self._pending.add(key)
                for others in _representative(codec):
                    self._recall(_key(codec, others, _DTYPE, self._device), _kind(codec, others, _DTYPE))
                self._pool.submit(self.find, codec, dict(settings), dtype)
            return self._known.get(key) or self._alike.get(kind)

    def find(self, codec: Codec, settings: Mapping[str, Any], dtype: torch.dtype) -> CodecSpeed | None:
        """The speed of ``codec``, measured now if it is not known; None if it cannot code at all here."""
        key, kind = _key(codec, settings, dtype, self._device), _kind(codec, settings, dtype)
        with self._lock:
            if key in self._known or self._recall(key, kind):
                return self._known[key]
        found = self._measured(key, codec, settings, dtype)
        with self._lock:
            self._learn(key, kind, found)
            self._pending.discard(key)
        return found

    def survey(self, codecs: Iterable[Codec]) -> None:
        """Measure what this machine tells others, as far as it is not known."""
        for codec in codecs:
            for settings in _representative(codec):
                self.find(codec, settings, _DTYPE)

    def close(self) -> None:
        """Measure nothing more. May be called twice."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _names(self, codec: Codec, settings: Mapping[str, Any], dtype: torch.dtype) -> tuple[str, tuple[str, str]]:
        """`_key` and `_kind`, made once for the same settings of a codec: sessions look again and again."""
        asked = codec, repr(settings), dtype, torch.get_num_threads()
        if asked not in self._named:
            self._named[asked] = _key(codec, settings, dtype, self._device), _kind(codec, settings, dtype)
        return self._named[asked]

    def _recall(self, key: str, kind: tuple[str, str]) -> bool:
        """Whether a note of an earlier process told; call with the lock held."""
        noted = self._read(key)
        if noted is not None:
            self._learn(key, kind, noted)
        return noted is not None

    def _learn(self, key: str, kind: tuple[str, str], found: CodecSpeed | None) -> None:
        self._known[key] = found
        if found is not None:
            self._alike.setdefault(kind, found)

    def plain(self) -> list[dict[str, Any]]:
        """What is known so far, as `read_speeds` reads it."""
        with self._lock:
            return [
                {
                    "codec": codec,
                    "engine": engine,
                    "encode": [speed.encode.fixed, speed.encode.rate],
                    "decode": [speed.decode.fixed, speed.decode.rate],
                }
                for (codec, engine), speed in self._alike.items()
            ]

    def _measured(self, key: str, codec: Codec, settings: Mapping[str, Any], dtype: torch.dtype) -> CodecSpeed | None:
        try:
            found = time_codec(codec, settings, dtype, self._device)
        except Exception as error:
            # Whatever somebody's codec raises, the others can still be chosen.
            if not self._closed:
                log.warning("codec %r cannot be used on %s: %s", codec.name, self._device, error)
            return None
        try:
            busy = psutil.getloadavg()[0] > (psutil.cpu_count() or 1)
            kept = {"at": time(), "busy": busy, **asdict(found)}
            atomic_write(self._folder / f"{key}.json", json.dumps(kept).encode())
        except ConfigError as error:
            log.debug("the speed of codec %r is not remembered: %s", codec.name, error)
        return found

    def _read(self, key: str) -> CodecSpeed | None:
        try:
            kept = json.loads((self._folder / f"{key}.json").read_text("utf-8"))
            if not 0 <= time() - kept["at"] < (_KEPT_IF_BUSY if kept["busy"] else _KEPT):
                return None
            encode, decode = (read_speed([kept[way]["fixed"], kept[way]["rate"]]) for way in ("encode", "decode"))
            bits = float(kept["bits"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return CodecSpeed(encode, decode, bits, kept.get("exact") is True) if encode and decode else None


def _representative(codec: Codec) -> Iterator[dict[str, Any]]:
    """Settings that stand for all others of the codec."""
    if type(codec) is not RawCodec:
        for quality in _REPRESENTATIVE:
            with suppress(CodecError):
                yield codec.settings(quality, codec.capabilities())


def _kind(codec: Codec, settings: Mapping[str, Any], dtype: torch.dtype) -> tuple[str, str]:
    """Codec and engine: what settings have in common that run at about the same speed."""
    return codec.name, codec.estimate(settings, dtype).engine


def _key(codec: Codec, settings: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> str:
    """What a measurement depends on, as a file name."""
    kind = type(codec)
    facts = [
        __version__,
        torch.__version__,
        torch.get_num_threads(),
        str(dtype),
        label(device),
        kind.__module__,
        kind.__qualname__,
        codec.name,
        json.dumps([codec.capabilities(), dict(settings)], sort_keys=True, default=repr),
    ]
    return sha256(repr(facts).encode()).hexdigest()[:32]
