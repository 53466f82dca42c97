"""All codecs of the package keep what `mesh_codec.testing` asks of any codec, and it notices those that do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import pytest
import torch

from mesh_codec import Codec, DecodeLimits, Decoder, Encoded, Encoder, EntropyCodec, HevcCodec, LosslessCodec, RawCodec
from mesh_codec.testing import (
    CHECKS,
    check_codec,
    check_damage,
    check_forms,
    check_input_is_kept,
    check_limits,
    check_restoring,
    check_streams,
)

from .emulated_ans import EmulatedAns

CODECS = {
    "raw": RawCodec(),
    "lossless": LosslessCodec(),
    "lossless-gpu": LosslessCodec(EmulatedAns()),
    "entropy": EntropyCodec(),
    "entropy-gpu": EntropyCodec(EmulatedAns()),
    "hevc": HevcCodec(),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
def test_codec(codec: Codec, check: Callable[[Codec], None]) -> None:
    check(codec)


class Plain(RawCodec):
    """The raw codec, with the faults of the subclasses below."""

    def encoder(self, settings: Mapping[str, Any]) -> Encoder:  # type: ignore[override]
        return Coding(super().encoder(settings), self.coded)

    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> Decoder:  # type: ignore[override]  # noqa: B008
        return Restoring(super().decoder(settings, limits), self.restored)

    def coded(self, inner: Encoder, tensor: torch.Tensor) -> Encoded:
        return inner.encode(tensor)

    def restored(self, inner: Decoder, encoded: Encoded) -> torch.Tensor:
        return inner.decode(encoded)


class Coding(Encoder):
    def __init__(self, inner: Encoder, step: Callable[[Encoder, torch.Tensor], Encoded]) -> None:
        self._inner, self._step = inner, step

    def encode(self, tensor: torch.Tensor) -> Encoded:
        return self._step(self._inner, tensor)


class Restoring(Decoder):
    def __init__(self, inner: Decoder, step: Callable[[Decoder, Encoded], torch.Tensor]) -> None:
        self._inner, self._step = inner, step

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> torch.Tensor:
        return self._step(self._inner, encoded)


class ChangesItsInput(Plain):
    def coded(self, inner: Encoder, tensor: torch.Tensor) -> Encoded:
        return inner.encode(tensor.zero_())


class ForgetsTheSign(Plain):
    def restored(self, inner: Decoder, encoded: Encoded) -> torch.Tensor:
        back = inner.decode(encoded)
        return back.abs() if back.dtype.is_floating_point else back


class SendsATensorInItsHeader(Plain):
    def coded(self, inner: Encoder, tensor: torch.Tensor) -> Encoded:
        coded = inner.encode(tensor)
        return Encoded(coded.header | {"most": torch.tensor(1)}, coded.buffers)


class AllocatesWhatItIsTold(Plain):
    def restored(self, inner: Decoder, encoded: Encoded) -> torch.Tensor:
        shape = encoded.header["shape"]
        if prod(shape) <= 1 << 30:
            torch.empty(shape, dtype=torch.uint8)
        return inner.decode(encoded)


class TripsOverAHeader(Plain):
    def restored(self, inner: Decoder, encoded: Encoded) -> torch.Tensor:
        if encoded.header["shape"] is None:
            raise ValueError("no shape")
        return inner.decode(encoded)


class MixesItsStreams(Plain):
    last: torch.Tensor | None = None

    def coded(self, inner: Encoder, tensor: torch.Tensor) -> Encoded:
        before, self.last = self.last, tensor
        same = before is not None and before.shape == tensor.shape and before.dtype == tensor.dtype
        return inner.encode(before if same and before is not None else tensor)


class GoesBackToAKeyFrame(EntropyCodec):
    """Its encoder has no `restore` of its own."""

    def encoder(self, settings: Mapping[str, Any]) -> Encoder:
        inner = super().encoder(settings)
        inner.restore = lambda _: inner.reset()  # type: ignore[method-assign]
        return inner


class DeniesItsMemory(EntropyCodec):
    def memory(self, settings: Mapping[str, Any]) -> Any:
        return "none"


@pytest.mark.parametrize(
    ("codec", "check", "what"),
    [
        (ChangesItsInput(), check_input_is_kept, "changes its input"),
        (ForgetsTheSign(), check_forms, "all its bits"),
        (SendsATensorInItsHeader(), check_forms, "not plain"),
        (AllocatesWhatItIsTold(), check_limits, "allocates"),
        (TripsOverAHeader(), check_damage, "raises"),
        (MixesItsStreams(), check_streams, "all bits"),
        (GoesBackToAKeyFrame(), check_restoring, "not go back exactly"),
        (DeniesItsMemory(), check_restoring, "raises CodecStateLost"),
        (ForgetsTheSign(), check_codec, "all its bits"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Codec) else "",
)
def test_a_fault_is_found(codec: Codec, check: Callable[[Codec], None], what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        check(codec)
