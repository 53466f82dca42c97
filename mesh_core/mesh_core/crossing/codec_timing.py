"""Timing a codec on this machine: a small sample that looks like a hidden state, coded there and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mesh_codec.base import Codec
from mesh_core.crossing.codec_speed import MOST_FIXED, RATES, CodecSpeed, Speed
from mesh_core.system.device import synchronise

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
    lowest, highest = RATES
    if len(sizes) == 1:
        return Speed(0.0, min(max(sizes[0] / max(seconds[0], 1e-9), lowest), highest))
    rate = (sizes[1] - sizes[0]) / max(seconds[1] - seconds[0], seconds[1] / 4, 1e-9)
    rate = min(max(rate, lowest), highest)
    return Speed(min(max(seconds[0] - sizes[0] / rate, 0.0), MOST_FIXED), rate)
