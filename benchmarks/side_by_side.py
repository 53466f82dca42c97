"""What a step costs in two checkouts, in one run: this one and another, for example a worktree of an older commit.

    git worktree add ../older COMMIT
    python -m benchmarks.side_by_side ../older --rounds 5 --steps 40

`benchmarks.step` of either runs in turns, in processes that import that checkout's packages alone; each round begins
with the other one. An older checkout measures the same with ``mesh bench step``. The table has medians over the rounds;
look at the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import ROOT
from mesh_core.errors import ConfigError
from mesh_core.system.tables import aligned

Case = tuple[int, bool]
"""Bytes of the state, and whether it crosses encrypted."""

_COLUMNS = (("overhead ms", "overhead_ms", 2), ("step ms", "total_ms", 1))


def environment(checkout: Path, home: Path) -> dict[str, str]:
    """Variables of a process that imports what lies in ``checkout``.

    Raises:
        ConfigError: it would import something else.
    """
    parts = [checkout / "mesh_core", checkout / "codec", *sorted((checkout / "adapters").glob("*"))]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, parts)), "MESH_HOME": str(home)}
    asked = [sys.executable, "-c", "import mesh_core; print(mesh_core.__file__)"]
    found = subprocess.run(asked, env=variables, cwd=home, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_relative_to(checkout):
        raise ConfigError(f"{checkout} holds no mesh_core: {found} is imported.", hint="the root of a checkout")
    return variables


def measured(checkout: Path, home: Path, options: Sequence[str]) -> dict[Case, dict[str, Any]]:
    """One run of a checkout's own measurement, steps and turns of the bare ring alternating, by case."""
    own = ["benchmarks.step"] if (checkout / "benchmarks" / "step.py").exists() else ["mesh_core.cli", "bench", "step"]
    command = [sys.executable, "-m", *own, "--json", *options]
    variables, quiet = environment(checkout, home), subprocess.DEVNULL
    done = subprocess.run(command, env=variables, cwd=checkout, stdout=subprocess.PIPE, stderr=quiet, check=True)
    return {(found["state_bytes"], found["encrypted"]): found for found in json.loads(done.stdout)["results"]}


def table(names: Sequence[str], rounds: Sequence[Sequence[dict[Case, dict[str, Any]]]]) -> str:
    """A row per case: medians of both checkouts, and the second as a share of the first.

    Args:
        rounds: of each checkout.
    """
    heads = [[f"{name} {head}" for name in names] + ["ratio"] for head, _, _ in _COLUMNS]
    cells = [["state MB", "link", *heads[0], *heads[1]]]
    for case in rounds[0][0]:
        row = [f"{case[0] / 1e6:.1f}", "CURVE" if case[1] else "plain"]
        for _, key, digits in _COLUMNS:
            first, second = (median(one[case][key] for one in runs) for runs in rounds)
            row += [f"{first:.{digits}f}", f"{second:.{digits}f}", f"{second / first:.2f}"]
        cells.append(row)
    return "\n".join([*aligned(cells), "", f"Medians of {len(rounds[0])} rounds of medians; ratio: second over first."])


def main() -> None:
    """Alternate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--rounds", type=int, default=5, help="of each")
    parser.add_argument("--steps", type=int, default=40, help="measured per case and round")
    parser.add_argument("--large", action="store_true", help="states of 34 and 38 MB too")
    options = parser.parse_args()
    checkouts = (options.other.resolve(), ROOT)
    passed = ["--steps", str(options.steps), *([] if options.large else ["--small"])]
    rounds: tuple[list[dict[Case, dict[str, Any]]], ...] = ([], [])
    with TemporaryDirectory(ignore_cleanup_errors=True) as home:
        for number in range(options.rounds):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                rounds[which].append(measured(checkouts[which], Path(home), passed))
                print(f"round {number + 1}: {checkouts[which]} done", file=sys.stderr, flush=True)
    print(table(("other", "this"), rounds))


if __name__ == "__main__":
    main()
