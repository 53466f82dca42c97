"""Every codec engine of an NVIDIA GPU in one run: nvCOMP's ANS beside the portable coder, prediction, NVENC and NVDEC.

    python benchmarks/codec_on_gpu.py --label "NVIDIA H100 80GB" --save benchmarks/results

[4096, 4096], [4608, 6144] and [8192, 4096] in bfloat16; CUDA events, medians, warm. Streams of libx265 are decoded by
NVDEC and compared with FFmpeg bit for bit. Needs the extras ``cuda``, ``hevc`` and ``nvenc``; what is missing is said
in its row. Without a CUDA device it says so and exits with 2. Takes some minutes, most of them in libx265.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from mesh_core.bench.codec_device import SHAPES, run, table
from mesh_core.bench.report import save
from mesh_core.device import label
from mesh_core.errors import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-video", action="store_true", help="leave out the video engines")
    parser.add_argument("--first", action="store_true", help="the first shape only")
    parser.add_argument("--label", default="", help="what the saved results call this machine")
    parser.add_argument("--save", type=Path, default=None, help="folder for a .md and a .json")
    options = parser.parse_args()
    device, rows = torch.device(options.device), []
    try:
        for row in run(device, SHAPES[:1] if options.first else SHAPES, video=not options.no_video):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    text = table(rows)
    print(text)
    if options.save:
        facts = {"rows": [asdict(row) for row in rows], "torch cuda": torch.version.cuda}
        for path in save(options.save, "codec-device", options.label or label(device), facts, text):
            print(f"saved {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
