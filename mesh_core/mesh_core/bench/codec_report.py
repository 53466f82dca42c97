"""The table and the plot of ``mesh bench codec``, and what its numbers say of the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mesh_codec.qualities import FINE, find
from mesh_core.bench.codec_pictures import PictureQuality

TARGET_BITS = {28: 1.4, 8: 2.8, 4: 4.2}
"""Bits per element by number of steps, that keep `LEAST_DB`."""

LEAST_DB = find(FINE).psnr or 0.0

LEGEND = """\
bits: per element of the hidden state over all steps, payload and headers. PSNR: of the final 8-bit picture against
that of the uncut model, least and mean over the prompts; 100 dB is no difference. The state crosses in bfloat16."""


def table(results: Sequence[PictureQuality]) -> str:
    """Plain text: a row per codec and setting, three columns per number of steps."""
    steps = sorted({q.steps for q in results})
    labels = list(dict.fromkeys(q.label for q in results))
    found = {(q.label, q.steps): q for q in results}
    width = max(map(len, labels))
    head = " " * width + "".join(f"{f'{n} steps':>24}" for n in steps)
    unit = " " * width + f"{'bits':>10}{'min':>7}{'mean':>7}" * len(steps)
    lines = [head, unit]
    for label in labels:
        cells = (found.get((label, n)) for n in steps)
        shown = (f"{q.bits:10.2f}{q.psnr_min:7.1f}{q.psnr_mean:7.1f}" if q else " " * 24 for q in cells)
        lines.append(label.ljust(width) + "".join(shown))
    return "\n".join([*lines, "", LEGEND])


def verdicts(results: Sequence[PictureQuality]) -> list[str]:
    """For each number of steps, the fewest bits that kept 40 dB, beside the target."""
    lines = []
    for steps, target in TARGET_BITS.items():
        good = [q for q in results if q.steps == steps and q.psnr_min >= LEAST_DB]
        if not good:
            continue
        best = min(good, key=lambda q: q.bits)
        met = "met   " if best.bits <= target else "MISSED"
        lines.append(
            f"{met}  {steps} steps, least PSNR >= {LEAST_DB:g} dB: {best.bits:.2f} bits with {best.label} "
            f"({best.psnr_min:.1f} dB), target <= {target}"
        )
    return lines


def in_words(found: PictureQuality) -> str:
    """One of the results as a line, for whoever waits for the others."""
    return f"{found.label}, {found.steps} steps: {found.bits:.2f} bits, {found.psnr_min:.1f} dB"


def text(results: Sequence[PictureQuality], setup: Mapping[str, Any]) -> str:
    """The whole report: what was measured with, the table, the targets."""
    listed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setup.items() if value is not None)
    return "\n".join([listed, "", table(results), "", *verdicts(results)])


def plain(results: Sequence[PictureQuality], setup: Mapping[str, Any]) -> dict[str, Any]:
    """The whole report as JSON takes it."""
    setup = {name.replace("_", " "): value for name, value in setup.items()}
    return {"setup": setup, "results": [asdict(q) for q in results], "targets": verdicts(results)}


def plot(results: Sequence[PictureQuality], path: Path) -> Path:
    """Rate against distortion, a panel per number of steps, written to ``path``, which is returned.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = sorted({q.steps for q in results})
    figure = Figure(figsize=(5 * len(steps), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, n in zip(figure.subplots(1, len(steps), sharey=True, squeeze=False)[0], steps, strict=True):
        for family in dict.fromkeys(q.family for q in results):
            own = sorted((q for q in results if q.family == family and q.steps == n), key=lambda q: q.bits)
            panel.plot([q.bits for q in own], [q.psnr_min for q in own], marker="o", label=family)
        panel.axhline(LEAST_DB, color="grey", linewidth=0.8, linestyle="--")
        if n in TARGET_BITS:
            panel.axvline(TARGET_BITS[n], color="grey", linewidth=0.8, linestyle="--")
        panel.set(title=f"{n} steps", xlabel="bits per element", xscale="log")
        panel.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    figure.axes[0].set_ylabel("PSNR of the final picture, dB, least over prompts")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path
