"""Passes that have nothing to do with each other share no codec stream, nor does a generation depend on the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from mesh_codec import CodecChoice, CodecStateLost, DecodeLimits, EntropyCodec
from mesh_core.builtin import load_plugins
from mesh_core.crossing.sequences import MOST_SEQUENCES, Sequences, Turn
from mesh_core.crossing.streams import Streams
from mesh_core.hookspecs import hookimpl
from mesh_core.host.runner import SplitRunner
from tests.adapters import tiny
from tests.support.splitting import split
from tests.support.workers import thread_workers

STEPS = (1.0, 0.8, 0.5, 0.2)
Open = Callable[[], AbstractContextManager[SplitRunner]]


class FixedChoice:
    """Codecs that do not follow the clock: with them the streams would start anew now and then."""

    @hookimpl
    def mesh_choose_codec(self, role: str) -> CodecChoice:
        return CodecChoice("entropy", {"step": 0.2}) if role == "hidden" else CodecChoice("raw")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens sessions whose state crosses coded, on one worker."""
    plugins = load_plugins()
    plugins._manager.register(FixedChoice(), "fixed")
    path = tmp_path_factory.mktemp("models") / "klein"
    tiny.transformer(guidance=False).save_pretrained(path)
    with thread_workers(path.parent, 1, "inproc", plugins=plugins) as workers:
        yield lambda: split(path, ":3", workers, plugins, quality="balanced")


def generation(prompt: int, noise: int) -> Iterator[dict[str, Any]]:
    """The inputs of steps whose latents change little by little."""
    start = tiny.inputs(guidance=False, height=8, width=8, seed=noise)
    text = tiny.inputs(guidance=False, height=8, width=8, seed=prompt)["encoder_hidden_states"]
    for sigma in STEPS:
        yield {
            **start,
            "hidden_states": start["hidden_states"] * (0.9 + 0.1 * sigma),
            "encoder_hidden_states": text,
            "timestep": torch.tensor([sigma]),
        }


def sent(run: SplitRunner) -> list[int]:
    return [step.hops[0].in_coded for step in run.stats.steps]


def alone(opened: Open, prompt: int, noise: int) -> list[Tensor]:
    with opened() as run:
        results = [run(inputs) for inputs in generation(prompt, noise)]
        first, *others = sent(run)
        assert max(others) < 0.8 * first, "a step is predicted from the one before"
        return results


def test_interleaved_passes_give_what_each_gives_alone(opened: Open) -> None:
    expected = [alone(opened, prompt, noise=1) for prompt in (5, 6)]
    with opened() as run:
        both = [[run(inputs) for inputs in pair] for pair in zip(generation(5, 1), generation(6, 1), strict=True)]
    for results, wanted in zip(zip(*both, strict=True), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


def test_the_same_request_gives_the_same_result_whatever_ran_before(opened: Open) -> None:
    expected = alone(opened, 5, noise=2)
    with opened() as run:
        for inputs in generation(5, noise=1):
            run(inputs)
        again = [run(inputs) for inputs in generation(5, noise=2)]
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_more_passes_than_are_kept_still_run(opened: Open) -> None:
    expected = alone(opened, 5, noise=1)
    passes = [generation(5, 1), *(generation(prompt, 1) for prompt in range(20, 20 + MOST_SEQUENCES))]
    with opened() as run:
        rounds = [[run(next(steps)) for steps in passes] for _ in STEPS]
        assert all(step.resent == 0 for step in run.stats.steps)
    for (got, *_), wanted in zip(rounds, expected, strict=True):
        assert float((got - wanted).square().mean()) < 0.01 * float(wanted.square().mean())


def test_an_end_that_dropped_its_streams_gets_a_key_frame(opened: Open) -> None:
    expected = alone(opened, 5, noise=1)
    with opened() as run:
        assert run.session is not None
        steps = generation(5, 1)
        results = [run(next(steps)), run(next(steps))]
        run.session._legs[0].encoder._passes.clear()
        results += [run(inputs) for inputs in steps]
        assert [step.resent for step in run.stats.steps] == [0, 0, 1, 0]
        assert [step.restarted for step in run.stats.steps] == [False, False, True, False]
        assert "1 steps started at a key frame: within the quality" in run.stats.table()
    assert float((results[-1] - expected[-1]).square().mean()) < 0.01 * float(expected[-1].square().mean())


CPU = torch.device("cpu")


def streams() -> Streams:
    codec = EntropyCodec()
    return Streams({"x": CodecChoice("entropy", {"step": 0.1})}, {"entropy": codec}, DecodeLimits())


def test_streams_are_bounded_at_both_ends() -> None:
    encoder, decoder = streams(), streams()
    tensor = torch.randn(64, 8)
    for i in range(3 * MOST_SEQUENCES):
        payload = encoder.encode(Turn(f"{i}#1", i + 1), {"x": tensor})
        decoder.decode(Turn(f"{i}#1", i + 1), payload.entries, payload.buffers, CPU)
    assert len(encoder._passes) == len(decoder._passes) == MOST_SEQUENCES
    for take in range(1, 20):
        encoder.encode(Turn(f"same#{take}", take), {"x": tensor})
    assert len(encoder._passes) == MOST_SEQUENCES and sum(name == "same" for name in encoder._passes) == 1


def test_a_stream_of_another_sequence_is_no_reference() -> None:
    encoder, decoder = streams(), streams()
    tensor = torch.randn(64, 8)
    encoder.encode(Turn("a#1", 1), {"x": tensor})
    payload = encoder.encode(Turn("a#1", 2, after=1), {"x": tensor})
    for turn in (Turn("a#1", 2, after=1), Turn("a#1", 2)):
        with pytest.raises(CodecStateLost):
            decoder.decode(turn, payload.entries, payload.buffers, CPU)


@pytest.mark.parametrize("arrived", [0, 1, 2], ids=lambda n: f"{n} of the lost ones arrived")
def test_a_step_that_is_coded_again_is_coded_as_if_it_had_never_been(arrived: int) -> None:
    tensors = [torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) for _ in range(1)]
    for i in range(5):
        tensors.append(tensors[-1] + 0.05 * torch.randn(64, 8, generator=torch.Generator().manual_seed(i + 1)))
    quiet, there = streams(), streams()
    encoder, decoder = streams(), streams()

    def cross(one: Streams, other: Streams, turn: Turn, tensor: Tensor) -> tuple[list[bytes], Tensor]:
        payload = one.encode(turn, {"x": tensor})
        return [bytes(b) for b in payload.buffers], other.decode(turn, payload.entries, payload.buffers, CPU)["x"]

    reached, number = 0, 0
    for step, tensor in enumerate(tensors, 1):
        wanted = cross(quiet, there, Turn("a#1", step, step - 1), tensor)
        for lost in range(2):
            number += 1
            payload = encoder.encode(Turn("a#1", number, reached), {"x": -tensor})
            if lost < arrived:
                decoder.decode(Turn("a#1", number, reached), payload.entries, payload.buffers, CPU)
        number += 1
        bytes_sent, found = cross(encoder, decoder, Turn("a#1", number, reached), tensor)
        assert bytes_sent == wanted[0] and torch.equal(found, wanted[1])
        reached = number


def test_names_follow_constants_and_generations() -> None:
    names = Sequences()
    cond, uncond = {"text": "c"}, {"text": "u"}
    first = [names.name("", constants, moment) for moment in "abc" for constants in (cond, uncond)]
    assert len(set(first)) == 2 and first[0] == first[2] == first[4]
    assert names.name("", cond, "a") not in first
    assert names.name("other", cond, "a") != names.name("", cond, "a")


def test_a_moment_that_is_looked_at_twice_in_a_row_begins_nothing() -> None:
    names = Sequences()
    assert len({names.name("", {}, moment) for moment in "aabbcc"}) == 1


def test_a_pass_that_was_dropped_does_not_meet_its_old_streams() -> None:
    names = Sequences()
    before = names.name("", {"text": "first"}, "a")
    for i in range(MOST_SEQUENCES):
        names.name("", {"text": str(i)}, "a")
    assert names.name("", {"text": "first"}, "b") != before
