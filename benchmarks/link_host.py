"""The host of the link benchmark, in a process of its own so that it can live behind the shaped link.

Is told where the worker is and what to run; says one line of JSON per row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mesh_core.bench.processes import plugins, read_line, say
from mesh_core.bench.step import open_session
from mesh_core.bench.through import ThroughModel
from mesh_core.crossing.stats import StepStats
from mesh_core.errors import MeshError
from mesh_core.host.options import SessionOptions
from mesh_core.model.numerics import Numerics
from mesh_core.model.spec import Conditioning
from mesh_core.system.config import Settings
from mesh_core.transport.base import Address
from mesh_core.transport.keys import KeyStore, KnownWorker

WARM_UP = 2
"""Steps that do not count: the first codes a key frame, and sizes are only known after it."""

CHANGE = 0.1
"""Of the synthetic state from step to step; measured on models with 28 steps: 5 to 11 % after the first."""


def main() -> None:
    """Is told where the worker is and the rows; says each when it was measured, then that it is done."""
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    told = read_line()
    store = KeyStore()
    store.remember(KnownWorker(told["address"].removeprefix("mesh://"), store.identity().server.public, "benchmark"))
    if told["installed"]:
        _pipeline(told)
    else:
        _synthetic(told)
    say({"done": True})


def summary(row: Mapping[str, Any], steps: Sequence[StepStats]) -> dict[str, Any]:
    """Medians of the steps that count."""
    steps = steps[WARM_UP:] if len(steps) > WARM_UP else steps

    def mid(values: Iterator[float]) -> float:
        return median(values)

    first = [s.hops[0] for s in steps]
    return {
        **row,
        "step_ms": mid(s.total_ms for s in steps),
        "wire_ms": mid(s.wire_ms for s in steps),
        "codec_ms": mid(s.encode_ms + s.decode_ms + sum(h.encode_ms + h.decode_ms for h in s.hops) for s in steps),
        "compute_ms": mid(sum(h.compute_ms for h in s.hops) for s in steps),
        "state_mb": mid(h.in_raw / 1e6 for h in first),
        "there_mb": mid(h.in_coded / 1e6 for h in first),
        "back_mb": mid(s.hops[-1].out_coded / 1e6 for s in steps),
        "of_raw": mid(h.in_coded / h.in_raw for h in first),
        "used": steps[-1].codec,
        "reason": steps[-1].reason,
    }


def _synthetic(told: Mapping[str, Any]) -> None:
    installed, path, whole = plugins(), Path(told["model"]), ThroughModel(1, head=True)
    states = list(drifting(told["shape"], told["steps"] + WARM_UP))
    for row in told["rows"]:
        options = SessionOptions(
            Numerics(torch.bfloat16), torch.device("cpu"), row["quality"], Settings(), row["codec"]
        )
        try:
            with open_session([Address(told["address"])], path, whole, options, installed) as session:
                for state in states:
                    session.run({"hidden_states": state}, Conditioning())
                say(summary(row, session.stats.steps))
        except MeshError as error:
            say({**row, "failed": error.message})


def _pipeline(told: Mapping[str, Any]) -> None:
    from diffusers.utils import logging as diffusers_logging

    from mesh_core.programs.diffusers import load_pipeline, split, stats

    diffusers_logging.disable_progress_bar()
    pipeline = load_pipeline(told["model"], local=":", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    for row in told["rows"]:
        try:
            split(
                pipeline,
                local=told["local"],
                workers=[told["address"]],
                quality=row["quality"],
                codec=row["codec"],
            )
            pipeline(
                prompt=told["prompt"],
                num_inference_steps=told["steps"] + WARM_UP,
                height=told["size"],
                width=told["size"],
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            )
            say(summary(row, stats(pipeline).steps))
        except MeshError as error:
            say({**row, "failed": error.message})


def drifting(shape: Sequence[int], steps: int) -> Iterator[Tensor]:
    """Hidden states [.., tokens, channels] of ``steps`` neighbouring steps: noise with unlike deviations per channel
    and a few massive channels, of which a part is new in each step."""
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    deviations = (noise(shape[-1]) * 0.5).exp()
    deviations[:: max(1, shape[-1] // 4)] *= 40
    state = noise(*shape)
    for _ in range(steps):
        yield (state * deviations).bfloat16()
        state = state * (1 - CHANGE**2) ** 0.5 + noise(*shape) * CHANGE


if __name__ == "__main__":
    main()
