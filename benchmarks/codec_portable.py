"""Speed and rate of the portable codecs, side by side with plain zstandard on the bfloat16 bytes, in one run.

The data is made here, not taken from a model: correlated channels with a falling spectrum on a white floor,
log-normal channel gains, means as large as the deviations, a few massive channels and one massive token. Rates on a
real model differ; so does what an error does to a picture, which this does not measure.

Predicted tensors differ from the one before by 6 % of their deviation, as measured in the middle of 28 steps.
    python -m benchmarks.codec_portable [--tokens 4096] [--channels 4096] [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

import torch
import zstandard
from torch import Tensor

from mesh_codec import Codec, Encoded, EntropyCodec, LosslessCodec, RawCodec

T = TypeVar("T")


def activations(tokens: int, channels: int) -> Tensor:
    """bfloat16 [tokens, channels]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank = max(1, channels // 16)
    spectrum = torch.arange(1, rank + 1) ** -0.5
    mixed = (normal(tokens, rank) * spectrum) @ normal(rank, channels) / spectrum.norm()
    gains = torch.exp(0.6 * normal(channels))
    gains[:: max(1, channels // 4)] *= 60
    values = (0.7 * mixed + 0.7 * normal(tokens, channels)) * gains + normal(channels) * gains
    values[tokens // 3] *= 50
    return values.bfloat16()


def changed(tensor: Tensor) -> Tensor:
    """``tensor`` a step later: 6 % of another token is added to each."""
    values = tensor.float()
    return (values + 0.06 * (values.roll(1, 0) - values.mean(0))).to(tensor.dtype)


def best(repeats: int, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of the fastest of ``repeats`` after one to warm up, and the result."""
    result, seconds = work(), float("inf")
    for _ in range(repeats):
        started = perf_counter()
        result = work()
        seconds = min(seconds, perf_counter() - started)
    return seconds, result


def row(name: str, tensor: Tensor, encode: float, decode: float, coded: int, error: str) -> None:
    size = tensor.nbytes
    print(
        f"{name:26}{speed(size, encode):>12}{speed(size, decode):>12}{coded * 8 / tensor.numel():10.2f}"
        f"{size / coded:8.2f}{error:>12}"
    )


def speed(size: int, seconds: float) -> str:
    """MB/s, unless no memory can have been read so fast."""
    return "view" if size / seconds > 1e12 else f"{size / seconds / 1e6:.0f}"


def bench(name: str, codec: Codec, settings: dict[str, Any], tensors: list[Tensor], repeats: int) -> None:
    """Code ``tensors`` in turn, one stream; the first is coded once before time is taken."""
    encoder, decoder = codec.encoder(settings), codec.decoder(settings)
    encode = decode = float("inf")
    coded: Encoded = encoder.encode(tensors[0])
    back = decoder.decode(coded)
    for i in range(1, repeats + 1):
        tensor = tensors[i % len(tensors)]
        started = perf_counter()
        coded = encoder.encode(tensor)
        middle = perf_counter()
        back = decoder.decode(coded)
        encode, decode = min(encode, middle - started), min(decode, perf_counter() - middle)
    noise = (tensor.float() - back.float()).square().mean(0)
    # Of the typical channel: massive ones would flatter any codec.
    signal = tensor.float().var(0).median()
    error = "exact" if torch.equal(tensor, back) else f"{10 * float(torch.log10(signal / noise.median())):.1f} dB"
    row(name, tensor, encode, decode, coded.nbytes, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tensor = activations(options.tokens, options.channels)
    print(f"[{options.tokens}, {options.channels}] bfloat16, {tensor.nbytes / 1e6:.1f} MB, data made here, best of")
    print(f"{options.repeats}; {os.cpu_count()} cores, torch uses {torch.get_num_threads()}; MB/s of bfloat16\n")
    print(f"{'':26}{'encode MB/s':>12}{'decode MB/s':>12}{'bits/el':>10}{'ratio':>8}{'SNR':>12}")
    bench("raw", RawCodec(), {}, [tensor], options.repeats)
    bench("lossless", LosslessCodec(), {}, [tensor], options.repeats)
    plain = tensor.view(torch.uint8).numpy().data.cast("B")
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    encode, frame = best(options.repeats, lambda: compressor.compress(plain))
    decode, _ = best(options.repeats, lambda: decompressor.decompress(frame))
    row("zstandard 1, one core", tensor, encode, decode, len(frame), "exact")
    other = changed(tensor)
    for step in (0.06, 0.12, 0.22, 0.4):
        alone, predicted = ({"step": step, "temporal": temporal} for temporal in (False, True))
        bench(f"entropy {step}", EntropyCodec(), alone, [tensor], options.repeats)
        bench(f"entropy {step}, predicted", EntropyCodec(), predicted, [tensor, other], options.repeats)


if __name__ == "__main__":
    main()
