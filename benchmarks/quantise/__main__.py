"""Write a model, whose weights are plain numbers, as a single file in another format.

python -m benchmarks.quantise examples/tiny-klein/model Q4_K -o tiny-klein-Q4_K
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quantise.kinds import WRITERS
from benchmarks.quantise.original import original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a pipeline's folder, a model's folder or a single file")
    parser.add_argument("format", choices=list(WRITERS))
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file, without its ending")
    arguments = parser.parse_args()
    checkpoint, tensors = original(arguments.model)
    file = WRITERS[arguments.format](tensors, arguments.output, checkpoint.header.metadata)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
