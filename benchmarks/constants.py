"""What the host spends per step on naming its constants, as ComfyUI gives them: ``python -m benchmarks.constants``.

In inference mode, with the tensors made anew for every step and two passes by turns. Names by hashing every time
stand beside names by comparing with copies on the device, step by step in one run. ``--device cuda`` for a GPU;
``--out FOLDER`` keeps the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from mesh_codec import RawCodec
from mesh_core.bench.report import save
from mesh_core.crossing.constants import ConstantsBook
from mesh_core.system.device import checked_device, synchronise

STEPS, WARM_UP, PASSES = 24, 2, 2
TEXTS = {"FLUX.2 Klein 4B": 7680, "FLUX.2 Klein 9B": 12288, "FLUX.2 Dev": 15360}
"""Width of the text; it has 512 tokens in bfloat16. The picture has 4096 positions."""


def constants_of(width: int, device: torch.device) -> dict[str, Tensor]:
    """The constants of one pass."""
    return {
        "encoder_hidden_states": torch.randn(1, 512, width, dtype=torch.bfloat16, device=device),
        "img_ids": torch.randn(4096, 4, device=device),
        "txt_ids": torch.randn(512, 4, device=device),
    }


def measure(width: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of a step for each way."""
    books = {"hashed": ConstantsBook(RawCodec(), copied=0), "compared": ConstantsBook(RawCodec())}
    took: dict[str, list[float]] = {way: [] for way in books}
    passes = [constants_of(width, device) for _ in range(PASSES)]
    for _ in range(STEPS):
        for constants in passes:
            names = []
            for way, book in books.items():
                given = {name: torch.cat([tensor]) for name, tensor in constants.items()}
                synchronise(device)
                began = perf_counter()
                names.append({name: digest for name, (digest, _) in book.names(given).items()})
                took[way].append((perf_counter() - began) * 1e3)
            assert names[0] == names[1]
    return {way: median(times[WARM_UP * PASSES :]) for way, times in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--label", default="", help="the hardware's name in the results")
    options = parser.parse_args()
    device = checked_device(options.device)
    with torch.inference_mode():
        found = {model: measure(width, device) for model, width in TEXTS.items()}
    rows = [
        f"  {model:16} {ms['hashed']:8.2f} {ms['compared']:9.2f} {ms['hashed'] / ms['compared']:7.1f}"
        for model, ms in found.items()
    ]
    head = f"naming the constants of a step, median of {(STEPS - WARM_UP) * PASSES}, {device.type}"
    text = "\n".join([head, f"  {'ms':16} {'hashed':>8} {'compared':>9} {'ratio':>7}", *rows])
    print(text)
    if options.out:
        save(options.out, "constants", options.label, {"device": str(device), "ms": found}, text)


if __name__ == "__main__":
    main()
