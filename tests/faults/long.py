"""Hours of faults, for people: `python -m tests.faults.long trials|messages`. The tests run a short form.

Prints what went wrong as it happens and a summary, which docs/explanation/security-model.md repeats.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path
from time import monotonic

import torch

from mesh_core.builtin import load_plugins
from tests.adapters import tiny
from tests.faults.attack import attack
from tests.faults.conftest import IMPATIENT, Case
from tests.faults.honest import member, record, some_lora
from tests.faults.processes import slow_model, workers
from tests.faults.trials import Summary, trials
from tests.support.splitting import checkpoint_at


def main() -> int:
    """0: everything held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("trials", "messages"))
    parser.add_argument("--number", type=int, help="of trials or messages; 500 and 100000 if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quality", default="lossless", help="of the trials; transparent predicts from step to step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MESH_HOME"] = str(Path(folder) / "home")
        model = slow_model(Path(folder) / "models" / "klein")
        run = _trials if options.what == "trials" else _messages
        return run(model, options)


def _trials(model: Path, options: argparse.Namespace) -> int:
    summary, number = Summary(), options.number or 500
    inputs = tiny.inputs(guidance=False, height=16, width=16)
    with trials(model, inputs, load_plugins(), IMPATIENT, options.quality) as chain:
        for seed in range(options.seed, options.seed + number):
            outcome = chain.run(seed)
            summary.add(outcome)
            if outcome.error or not outcome.exact:
                print(outcome, flush=True)
            if summary.trials % 50 == 0:
                print(f"{summary.trials} trials, {len(summary.lost)} lost", flush=True)
    print(
        f"{summary.trials} trials ({options.quality}): {len(summary.lost)} generations lost, "
        f"{len(summary.differing)} with differing values, {summary.within_quality} begun anew at a key frame after a "
        f"process died; {summary.resent} steps sent again; slowest {summary.slowest:.1f} s; "
        f"faults {dict(summary.kinds)}"
    )
    return bool(summary.lost or summary.differing)


def _messages(model: Path, options: argparse.Namespace) -> int:
    plugins = load_plugins()
    checkpoint = checkpoint_at(model, plugins)
    inputs = tiny.inputs(guidance=False)
    whole = tiny.transformer(guidance=False, doubles=1, singles=12)
    with torch.no_grad():
        case = Case(model, inputs, whole(**inputs, return_dict=False)[0])
    began = monotonic()
    with workers(model.parent, 1, IMPATIENT) as (worker,), member(worker.address, model.parent.parent) as hostile:
        recorded = record(case, worker.address, plugins, some_lora(checkpoint))
        report = attack(
            case, worker, plugins, hostile.channel, recorded, checkpoint,
            messages=options.number or 100_000, seed=options.seed,
            progress=lambda sent: print(f"{sent} sent", flush=True) if sent % 10_000 < 3 else None,
        )  # fmt: skip
        alive = worker.process.is_alive()
    honest = report.honest
    print(
        f"{report.sent} messages ({report.loras} LoRAs with right hashes) in {monotonic() - began:.0f} s, "
        f"{report.answered} answered; worker {'alive' if alive else 'DEAD'}, grown by {report.grown / 1e6:.0f} MB; "
        f"beside it {len(honest.exact)} steps, {len(honest.exact) - sum(honest.exact)} not exact; "
        f"{len(honest.pings)} pings, slowest {honest.slowest:.2f} s"
    )
    return not (alive and all(honest.exact) and honest.slowest < 1)


if __name__ == "__main__":
    sys.exit(main())
