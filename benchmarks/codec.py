"""``mesh bench codec`` beside a rival: the same pictures with the common min/max way through a video encoder.

python -m benchmarks.codec --save benchmarks/results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.minmax_codec import QPS, MinMaxCodec
from mesh_core.bench.codec_pictures import STEPS, PictureQuality, Pictures
from mesh_core.bench.codec_report import in_words, plain, plot, text
from mesh_core.bench.codec_settings import SETTINGS, CodecSetting
from mesh_core.bench.report import save
from mesh_core.builtin import installed_plugins

RIVAL = tuple(CodecSetting("per-channel min/max + HEVC", MinMaxCodec, {"qp": qp}) for qp in QPS)


def main() -> None:
    """All settings, then the rival's where PyAV is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path("examples/tiny-klein/model"))
    parser.add_argument("--prompts", type=int, default=4, help="how many")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--label", default="", help="of the machine")
    parser.add_argument("--save", type=Path, default=None, help="folder for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setup = {"prompts": options.prompts, "cut": None, "text_tokens": 64, "size": 128}
    pictures, results = Pictures(ROOT / options.model, installed_plugins(), **setup), list[PictureQuality]()
    try:
        for found in pictures.measure_all((*SETTINGS, *RIVAL), options.steps):
            print(in_words(found), file=sys.stderr, flush=True)
            results.append(found)
    except ImportError as error:
        print(f"the rival is left out: {error}", file=sys.stderr)
    facts = {"model": options.model.as_posix(), **setup}
    words = text(results, facts)
    print(words)
    if options.save:
        saved = save(options.save, "codec", options.label, plain(results, facts), words)
        for path in (*saved, plot(results, saved[0].with_suffix(".png"))):
            print(f"saved {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
