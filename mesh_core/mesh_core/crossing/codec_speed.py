"""How fast codecs run on this machine: measured once, on a small sample that looks like a hidden state, and kept.

Knows no links and no sessions. What another machine says of its own speeds is read here too, within reason.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock
from time import perf_counter, time
from typing import Any

import psutil
import torch
from torch import Tensor

from mesh_codec.base import Codec
from mesh_codec.errors import CodecError
from mesh_codec.qualities import EXACT, TYPICAL
from mesh_codec.raw import RawCodec
from mesh_core import __version__
from mesh_core.crossing.bandwidth import positive
from mesh_core.errors import ConfigError
from mesh_core.system.config import atomic_write, cache_dir
from mesh_core.system.device import label, synchronise

log = logging.getLogger(__name__)

_CHANNELS = 1024
_TOKENS = {"cuda": (256, 4096)}
"""Of the samples on a device. Two sizes tell what a call costs from what a byte costs."""
_FEW_TOKENS = (64, 512)

_ENOUGH = 0.3
"""Seconds that the smaller sample may take for the larger one to be tried too."""

_CHANGE = 0.25
"""By how much the sample changes from step to step, as hidden states do over few to medium numbers of steps."""

_TRIES, _TRIES_WITHIN = 8, 0.2
"""How often a sample is coded, and the seconds after which it is not coded again. The best try counts: whatever else
the machine does at the moment only makes it slower."""

_KEPT, _KEPT_IF_BUSY = 30 * 86400, 600
"""Seconds after which a measurement is made again; sooner if the machine had more to do than processors."""

_MOST_FIXED, _RATES = 10.0, (1e4, 1e13)
"""Seconds per call and bytes per second that a machine may claim; anything beyond is taken for the nearest."""

_REPRESENTATIVE = (TYPICAL, EXACT)
_DTYPE = torch.bfloat16
"""Qualities and element type at which a machine tells others its speeds."""


@dataclass(frozen=True)
class Speed:
    """``fixed`` seconds per call, and ``rate`` bytes of tensor per second beyond."""

    fixed: float
    rate: float

    def seconds(self, nbytes: float) -> float:
        return self.fixed + nbytes / self.rate


@dataclass(frozen=True)
class CodecSpeed:
    """One codec with one kind of settings on one machine.

    Attributes:
        bits: per element of the sample.
        exact: the sample came back bit for bit.
    """

    encode: Speed
    decode: Speed
    bits: float = 0.0
    exact: bool = False


COPYING = CodecSpeed(Speed(0.0, 5e9), Speed(0.0, 5e9), exact=True)
"""Of the raw codec, which does nothing else: not worth a measurement."""


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


def time_codec(codec: Codec, settings: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> CodecSpeed:
    """Code samples of one or two sizes there and back."""
    runs: list[_Run] = []
    for tokens in _TOKENS.get(device.type, _FEW_TOKENS):
        runs.append(_run(codec, settings, sample(tokens, dtype, device)))
        if runs[-1].encode + runs[-1].decode > _ENOUGH:
            break
    last = runs[-1]
    sizes = [r.nbytes for r in runs]
    return CodecSpeed(
        _fit(sizes, [r.encode for r in runs]), _fit(sizes, [r.decode for r in runs]), last.bits, last.exact
    )


def read_speed(said: object) -> Speed | None:
    """``[fixed, rate]`` as a peer says it, within reason; None when it says nothing that can be used."""
    if not isinstance(said, list | tuple) or len(said) != 2:
        return None
    fixed, rate = positive(said[0]), positive(said[1])
    if rate is None or (fixed is None and said[0] != 0):
        return None
    return Speed(min(fixed or 0.0, _MOST_FIXED), min(max(rate, _RATES[0]), _RATES[1]))


def read_speeds(said: object) -> dict[tuple[str, str], CodecSpeed]:
    """The speeds by codec and engine that a peer tells; what cannot be used is left out."""
    found: dict[tuple[str, str], CodecSpeed] = {}
    for entry in said if isinstance(said, list | tuple) else ():
        if isinstance(entry, Mapping):
            codec, engine = entry.get("codec"), entry.get("engine")
            encode, decode = read_speed(entry.get("encode")), read_speed(entry.get("decode"))
            if isinstance(codec, str) and isinstance(engine, str) and encode and decode:
                found[codec, engine] = CodecSpeed(encode, decode)
    return found


def sample(tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two neighbouring steps of something like a hidden state [tokens, channels]: unlike deviations, a few massive
    channels, a change that is small beside the state."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    deviations = (noise(_CHANNELS) * 0.5).exp()
    deviations[:: _CHANNELS // 4] *= 40
    first = noise(tokens, _CHANNELS)
    second = first * (1 - _CHANGE**2) ** 0.5 + noise(tokens, _CHANNELS) * _CHANGE
    return (first * deviations).to(device, dtype), (second * deviations).to(device, dtype)


@dataclass(frozen=True)
class _Run:
    """The best of some tries: seconds, and what came of the last one."""

    nbytes: int
    encode: float
    decode: float
    bits: float
    exact: bool


def _run(codec: Codec, settings: Mapping[str, Any], frames: tuple[Tensor, Tensor]) -> _Run:
    encoder, decoder = codec.encoder(settings), codec.decoder(settings)
    tensor, device = frames[0], frames[0].device
    decoder.decode(encoder.encode(tensor), device)
    encoding: list[float] = []
    decoding: list[float] = []
    while len(encoding) < 2 or (len(encoding) < _TRIES and sum(encoding) + sum(decoding) < _TRIES_WITHIN):
        # The step changes back and forth: a codec that predicts sees as much to predict each time.
        tensor = frames[(len(encoding) + 1) % 2]
        synchronise(device)
        began = perf_counter()
        coded = encoder.encode(tensor)
        encoded = perf_counter()
        back = decoder.decode(coded, device)
        synchronise(device)
        encoding.append(encoded - began)
        decoding.append(perf_counter() - encoded)
    bits = 8.0 * coded.nbytes / tensor.numel()
    return _Run(tensor.nbytes, min(encoding), min(decoding), bits, torch.equal(back, tensor))


def _fit(sizes: list[int], seconds: list[float]) -> Speed:
    """A fixed part and a rate through one or two points."""
    lowest, highest = _RATES
    if len(sizes) == 1:
        return Speed(0.0, min(max(sizes[0] / max(seconds[0], 1e-9), lowest), highest))
    rate = (sizes[1] - sizes[0]) / max(seconds[1] - seconds[0], seconds[1] / 4, 1e-9)
    rate = min(max(rate, lowest), highest)
    return Speed(min(max(seconds[0] - sizes[0] / rate, 0.0), _MOST_FIXED), rate)


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
