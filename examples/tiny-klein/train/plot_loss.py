"""Draw the loss curves of the three trainings from their logs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from common import DEFAULT_WORK, EXAMPLE
from matplotlib import pyplot

CURVES = (
    ("vae", "loss", "autoencoder: picture loss"),
    ("text_encoder", "text", "text encoder: next-token loss"),
    ("transformer", "loss", "transformer: velocity error"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--to", type=Path, default=EXAMPLE / "results" / "loss.png")
    arguments = parser.parse_args()
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(12, 3.2), layout="constrained")
    for axis, (name, column, title) in zip(axes, CURVES, strict=True):
        lines = (arguments.work / "logs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        points = [json.loads(line) for line in lines]
        axis.plot([p["step"] for p in points], [p[column] for p in points])
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.to, dpi=90)


if __name__ == "__main__":
    main()
