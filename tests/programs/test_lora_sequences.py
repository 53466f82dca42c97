"""Whatever is called in whatever order, a split pipeline has the LoRAs that a whole one has.

Both are driven with the same random sequences of calls. PEFT is at odds with itself in places: what was merged with one
strength and is taken out with another stays in by the difference; a deleted LoRA that was merged stays in for good;
each layer chooses for itself which LoRA follows a deleted one; disabled layers take out what was merged when they run,
not before. All of that is deterministic, so the split pipeline does the same.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import mesh_core
from mesh_core.builtin import load_plugins
from tests.support import loras, pipelines
from tests.support.workers import mesh_home, thread_workers

# (modules, rank): each has layers that another lacks.
FILES: dict[str, tuple[tuple[str, ...], int]] = {
    "chalk": (("to_q", "proj_out"), 5),
    "ink": (("to_q", "to_out.0", "x_embedder"), 3),
    "wash": (("linear_in", "to_qkv_mlp_proj", "x_embedder"), 2),
}
NAMES = st.sampled_from(sorted(FILES))
SOME = st.lists(NAMES, min_size=1, max_size=3, unique=True)
WEIGHT = st.sampled_from([1.0, 0.5, -0.3, 0.0])


class Sequences(RuleBasedStateMachine):
    """Set up by `pipes`."""

    fresh: Callable[[], tuple[Any, Any]]
    file: Callable[[str], str]

    @initialize()
    def start(self) -> None:
        self.whole, self.split = type(self).fresh()

    def both(self, act: Callable[[Any], Any]) -> None:
        """What one refuses, the other refuses."""
        refused = []
        for pipeline in (self.whole, self.split):
            try:
                act(pipeline)
                refused.append("")
            except ValueError as error:
                refused.append(type(error).__name__)
        assert refused[0] == refused[1]

    @rule(name=NAMES)
    def load(self, name: str) -> None:
        self.both(lambda p: p.load_lora_weights(type(self).file(name), adapter_name=name))

    @rule(names=SOME, weights=st.lists(WEIGHT, min_size=3, max_size=3))
    def weigh(self, names: list[str], weights: list[float]) -> None:
        self.both(lambda p: p.set_adapters(names, weights[: len(names)]))

    @rule(names=st.none() | SOME, scale=WEIGHT.filter(bool))
    def fuse(self, names: list[str] | None, scale: float) -> None:
        self.both(lambda p: p.fuse_lora(adapter_names=names, lora_scale=scale))

    @rule()
    def unfuse(self) -> None:
        self.both(lambda p: p.unfuse_lora())

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        self.both(lambda p: p.delete_adapters(name))

    @rule()
    def disable(self) -> None:
        self.both(lambda p: p.disable_lora())

    @rule()
    def enable(self) -> None:
        self.both(lambda p: p.enable_lora())

    @rule()
    def unload(self) -> None:
        self.both(lambda p: p.unload_lora_weights())

    @rule()
    def run(self) -> None:
        whole, split = (pipelines.run(p, num_inference_steps=1, output_type="latent") for p in (self.whole, self.split))
        torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-4)

    @invariant()
    def both_say_the_same(self) -> None:
        for question in ("get_list_adapters", "get_active_adapters"):
            assert getattr(self.split, question)() == getattr(self.whole, question)()
        assert self.split.fused_loras == self.whole.fused_loras

    def teardown(self) -> None:
        self.run()
        mesh_core.unsplit(self.split)
        self.both_say_the_same()
        self.run()
        self.disable()
        self.run()


@pytest.fixture
def sequences(tmp_path: Path) -> Iterator[type[Sequences]]:
    plugins = load_plugins()
    pipelines.save(tmp_path / "klein", dtype=torch.float32)
    first = Flux2KleinPipeline.from_pretrained(tmp_path / "klein", dtype=torch.float32)
    for seed, (name, (modules, rank)) in enumerate(FILES.items()):
        state = loras.peft(loras.modules(first.transformer, *modules), rank=rank, seed=100 * seed)
        loras.save(tmp_path / f"{name}.safetensors", state)
    with mesh_home(tmp_path / "home"), thread_workers(tmp_path / "klein", 1, "inproc", plugins=plugins) as workers:

        def fresh() -> tuple[Any, Any]:
            whole, split = (
                Flux2KleinPipeline(
                    **{**first.components, "transformer": type(first.transformer).from_pretrained(folder)}
                )
                for folder in [tmp_path / "klein" / "transformer"] * 2
            )
            addresses = [w.address for w in workers]
            return whole, mesh_core.split(split, local=":2", workers=addresses, plugins=plugins)

        yield type(
            "Pipes",
            (Sequences,),
            {"fresh": staticmethod(fresh), "file": staticmethod(lambda n: str(tmp_path / f"{n}.safetensors"))},
        )


def test_every_sequence_of_calls_ends_alike(sequences: type[Sequences]) -> None:
    examples = int(os.environ.get("MESH_TEST_LORA_SEQUENCES", "8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            sequences,
            settings=settings(
                max_examples=examples,
                stateful_step_count=20,
                derandomize=True,
                phases=[Phase.generate],
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
