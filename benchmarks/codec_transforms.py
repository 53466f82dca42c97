"""Would a transform before the quantiser save bits? Rotations of channels and of the token grid, on final pictures.

    python -m benchmarks.codec_transforms --save benchmarks/results

tiny-klein draws prompts with its hidden state coded at the middle cut, by the entropy codec alone and behind
orthonormal transforms: ``klt``, the channels' principal axes; ``klt of changes``, those of the change between two
steps; both from other prompts than the ones that are measured; ``dct``, a two-dimensional DCT over the grid of picture
tokens, for each channel. An orthonormal transform leaves the error what it is, so that what counts is bits at the same
least PSNR: each row is read off the line through several quantiser steps. A transform's basis is not sent: both ends
would have it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mesh_codec import Codec, Decoder, Encoded, Encoder, EntropyCodec
from mesh_core.bench.codec_pictures import PROMPTS, Pictures
from mesh_core.bench.codec_settings import CodecSetting
from mesh_core.bench.report import save
from mesh_core.builtin import installed_plugins

MODEL = Path(__file__).parents[1] / "examples" / "tiny-klein" / "model"
SIZE, TEXT_TOKENS, MEASURED, LEARNT = 128, 64, 4, 12
STEPS = (0.05, 0.1, 0.2, 0.4)
TARGETS = (40.0, 35.0)

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Turned(Codec):
    """The entropy codec behind an orthonormal transform of [1, tokens, channels]."""

    name: ClassVar[str] = "turned"
    there: Transform
    back: Transform

    def capabilities(self) -> dict[str, Any]:
        return {}

    def settings(self, quality: Any, peer: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def encoder(self, settings: Mapping[str, Any]) -> Encoder:
        inner, there = EntropyCodec().encoder(settings), self.there

        class Turning(Encoder):
            def encode(self, tensor: Tensor) -> Encoded:
                return inner.encode(there(tensor.float()))

        return Turning()

    def decoder(self, settings: Mapping[str, Any], limits: Any = None) -> Decoder:
        inner, back = EntropyCodec().decoder(settings), self.back

        class TurningBack(Decoder):
            def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
                return back(inner.decode(encoded, device))

        return TurningBack()


def transforms(plugins: Any) -> dict[str, tuple[Transform, Transform]]:
    """By name: there and back. The axes are learnt at 8 steps from prompts that are not measured."""
    states = collected(plugins)
    changes = states[1:] - states[:-1]
    plain, of_changes = axes(states.flatten(0, 2)), axes(changes.flatten(0, 2))
    grid = SIZE // 16
    dct = torch.from_numpy(dct_matrix(grid)).float()

    def dct2(tensor: Tensor, matrix: Tensor) -> Tensor:
        text, picture = tensor[:, : -grid * grid], tensor[:, -grid * grid :]
        squares = picture.unflatten(1, (grid, grid))
        squares = torch.einsum("ay,bx,nyxc->nabc", matrix, matrix, squares)
        return torch.cat([text, squares.flatten(1, 2)], 1)

    def turn(matrix: Tensor) -> tuple[Transform, Transform]:
        return lambda t: t @ matrix, lambda t: t @ matrix.t()

    dct_pair: tuple[Transform, Transform] = (lambda t: dct2(t, dct), lambda t: dct2(t, dct.t()))
    klt = turn(plain)
    return {
        "none": (lambda t: t, lambda t: t),
        "klt": klt,
        "klt of changes": turn(of_changes),
        "dct": dct_pair,
        "klt and dct": (lambda t: dct_pair[0](klt[0](t)), lambda t: klt[1](dct_pair[1](t))),
    }


def collected(plugins: Any) -> Tensor:
    """Hidden states [steps, prompts, tokens, channels] at the cut, of the prompts to learn from."""
    pictures = Pictures(MODEL, plugins, MEASURED + LEARNT, None, TEXT_TOKENS, SIZE)
    seen: dict[int, list[Tensor]] = {}

    def look(picture: int, name: str, tensor: Tensor) -> Tensor:
        seen.setdefault(picture, []).append(tensor.clone())
        return tensor

    pictures.draw(8, look)
    return torch.stack([torch.stack(seen[i]) for i in range(MEASURED, MEASURED + LEARNT)], 1)


def axes(samples: Tensor) -> Tensor:
    """Eigenvectors [channels, channels] of the covariance of ``samples`` [n, channels]."""
    return torch.linalg.eigh(torch.cov(samples.double().t())).eigenvectors.float()


def dct_matrix(n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Orthonormal DCT-II [n, n]."""
    k, i = np.mgrid[:n, :n]
    return np.where(k == 0, np.sqrt(1 / n), np.sqrt(2 / n) * np.cos(np.pi * (2 * i + 1) * k / (2 * n)))


def bits_at(points: list[Any], target: float) -> float | None:
    """Bits at ``target`` dB of least PSNR, between the two points around it; None beyond them."""
    ordered = sorted(points, key=lambda p: p.psnr_min)
    for low, high in pairwise(ordered):
        if low.psnr_min <= target <= high.psnr_min:
            share = (target - low.psnr_min) / (high.psnr_min - low.psnr_min)
            return float(low.bits + share * (high.bits - low.bits))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 28])
    parser.add_argument("--save", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--label", default="")
    arguments = parser.parse_args()
    plugins = installed_plugins()
    known = transforms(plugins)
    pictures = Pictures(MODEL, plugins, MEASURED, None, TEXT_TOKENS, SIZE)
    points: list[dict[str, Any]] = []
    lines = ["| transform | prediction | steps | " + " | ".join(f"bits at {t:.0f} dB" for t in TARGETS) + " |"]
    lines.append("|" + "---|" * (3 + len(TARGETS)))
    for temporal in (True, False):
        for steps in arguments.steps:
            for name, (there, back) in known.items():
                settings = [{"step": step, "temporal": temporal} for step in STEPS]
                rows = [CodecSetting(name, lambda t=there, b=back: Turned(t, b), one) for one in settings]
                found = [pictures.measure(row, steps) for row in rows]
                points += [asdict(quality) | {"temporal": temporal} for quality in found]
                cells = [bits_at(found, target) for target in TARGETS]
                shown = " | ".join("-" if bits is None else f"{bits:.2f}" for bits in cells)
                lines.append(f"| {name} | {'yes' if temporal else 'no'} | {steps} | {shown} |")
                print(lines[-1], flush=True)
    text = "\n".join([f"tiny-klein, {MEASURED} prompts of {len(PROMPTS)}; axes from {LEARNT} others", "", *lines])
    if arguments.save:
        for path in save(arguments.save, "codec-transforms", arguments.label, {"points": points}, text):
            print(f"saved {path}")


if __name__ == "__main__":
    main()
