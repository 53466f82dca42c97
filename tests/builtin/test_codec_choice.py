"""The built-in choice: the least time that meets the quality, explained, and kept unless changing is worth it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from mesh_codec.base import Codec, CodecChoice, DecodeLimits, Decoder, Encoder, Estimate, Quality
from mesh_codec.errors import CodecUnsupported
from mesh_codec.raw import RawCodec
from mesh_core.builtin.codec_choice import DefaultCodecChoice
from mesh_core.crossing.bandwidth import Link
from mesh_core.crossing.codec_speed import CodecSpeed, Speed
from mesh_core.crossing.cost import Crossing, End, settings_key

KLEIN = 4608 * 4096
GIGABIT, FAST = Link(112e6, 3e-4), Link(6e9, 1e-4)


class Coded(Codec):
    """A codec that is only facts: ``bits`` None says nothing of them."""

    def __init__(self, name: str, qualities: Mapping[str, dict[str, Any]], bits: float | None = None) -> None:
        self.name = name  # type: ignore[misc]
        self.qualities, self.bits = qualities, bits

    def capabilities(self) -> dict[str, Any]:
        return {}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        if quality not in self.qualities:
            raise CodecUnsupported(f"no {quality}")
        return dict(self.qualities[quality])

    def estimate(self, settings: Mapping[str, Any], dtype: torch.dtype) -> Estimate:
        return Estimate(self.bits)

    def encoder(self, settings: Mapping[str, Any]) -> Encoder:
        raise NotImplementedError

    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> Decoder:  # noqa: B008
        raise NotImplementedError


RAW = RawCodec()
LOSSLESS = Coded("lossless", {q: {} for q in ("lossless", "transparent", "balanced", "fast")}, 11.0)
ENTROPY = Coded("entropy", {"balanced": {"step": 0.2}, "fast": {"step": 0.4}}, 4.0)


class Book:
    """Speeds of this machine, in bytes per second each way; what is not named here cannot be used."""

    def __init__(self, **rates: float) -> None:
        self.rates = {"raw": 20e9, **rates}

    def look(self, codec: Codec, settings: Mapping[str, Any], dtype: torch.dtype) -> CodecSpeed | None:
        rate = self.rates.get(codec.name)
        if rate is None:
            return None
        exact = codec.name in ("raw", "lossless")
        return CodecSpeed(Speed(1e-4, rate), Speed(1e-4, rate), bits=3.3, exact=exact)


CPU = Book(entropy=150e6, lossless=200e6)
GPU = Book(entropy=60e9, lossless=60e9)


def crossing(link: Link | None, book: Book = CPU, **more: Any) -> Crossing:
    here = End(book=book)  # type: ignore[arg-type]
    facts = {"elements": KLEIN, "dtype": torch.bfloat16, "sender": here, "receiver": here, "here": book, "link": link}
    return Crossing(**(facts | more))


def choose(
    facts: Crossing, quality: Quality = "balanced", role: Any = "hidden", codecs: Any = (RAW, LOSSLESS, ENTROPY)
) -> CodecChoice | None:
    peer = {codec.name: codec.capabilities() for codec in codecs}
    return DefaultCodecChoice().mesh_choose_codec(role, facts.link, quality, codecs, peer, facts)


def chosen(*arguments: Any, **more: Any) -> str:
    choice = choose(*arguments, **more)
    assert choice is not None
    return choice.codec


def test_a_slow_codec_is_not_used_on_a_fast_link() -> None:
    assert chosen(crossing(FAST)) == "raw"
    assert chosen(crossing(FAST), "lossless") == "raw"


def test_a_slow_link_is_worth_coding_for() -> None:
    assert chosen(crossing(Link(12e6, 1e-3))) == "entropy"
    assert chosen(crossing(Link(12e6, 1e-3)), "lossless") == "lossless"


def test_a_fast_codec_pays_on_a_faster_link() -> None:
    assert chosen(crossing(GIGABIT, Book(entropy=60e6))) == "raw"
    assert chosen(crossing(GIGABIT, GPU)) == "entropy"


def test_the_other_end_counts_too() -> None:
    claimed = {("entropy", ""): CodecSpeed(Speed(0, 20e6), Speed(0, 20e6))}
    assert chosen(crossing(GIGABIT, GPU, receiver=End(claimed=claimed))) != "entropy"


def test_an_end_that_says_nothing_is_taken_for_one_like_this() -> None:
    assert chosen(crossing(GIGABIT, GPU, receiver=End())) == "entropy"


def test_another_engine_of_the_codec_is_better_than_nothing() -> None:
    claimed = {("entropy", "nvcomp"): CodecSpeed(Speed(0, 20e6), Speed(0, 20e6))}
    assert chosen(crossing(GIGABIT, GPU, receiver=End(claimed=claimed))) != "entropy"


def test_it_explains_itself_in_one_line() -> None:
    coded = choose(crossing(GIGABIT, GPU))
    assert coded is not None and coded.reason == "1 GbE measured 112 MB/s: entropy, 4.0 bit"
    uncoded = choose(crossing(FAST))
    assert uncoded is not None and uncoded.reason == "link measured 6000 MB/s: raw, 16 bit"
    unmeasured = choose(crossing(None, GPU))
    assert unmeasured is not None and unmeasured.reason == "link not measured: entropy, 4.0 bit"


def test_what_steps_really_cost_counts_more_than_what_a_codec_expects() -> None:
    seen = {settings_key("entropy", {"step": 0.2}): 15.5}
    assert chosen(crossing(GIGABIT, GPU, bits=seen)) == "lossless"
    slower = End(book=GPU, factors={("entropy", "encode"): 5000.0})  # type: ignore[arg-type]
    assert chosen(crossing(GIGABIT, GPU, sender=slower)) == "lossless"


def test_a_codec_that_says_nothing_of_its_bits_is_taken_by_a_sample() -> None:
    silent = Coded("silent", {"balanced": {}})
    facts = crossing(GIGABIT, Book(silent=60e9))
    cost = facts.cost(silent, {})
    assert cost is not None and cost.bits == 3.3
    assert chosen(facts, codecs=(RAW, silent)) == "silent"


def test_what_is_hardly_faster_coded_stays_exact() -> None:
    # 16 bits at this rate take as long as 4 bits and coding both ways.
    even = Link(KLEIN * 1.5 / (2 * KLEIN * 2 / 150e6), 0.0)
    assert chosen(crossing(even), codecs=(RAW, ENTROPY)) == "raw"


def test_lossless_takes_nothing_that_did_not_come_back_bit_for_bit() -> None:
    liar = Coded("entropy", {"lossless": {}}, 0.1)
    assert chosen(crossing(GIGABIT, GPU), "lossless", codecs=(RAW, liar)) == "raw"


def test_only_hidden_state_is_coded_with_loss() -> None:
    slow = crossing(Link(1e6, 1e-3))
    assert chosen(slow, "fast", role="prediction") == "lossless"
    assert chosen(slow, "fast", role="latent") == "lossless"
    assert chosen(slow, "fast", role="exact") == "raw"


def test_a_fine_state_is_coded_on_its_own_and_never_with_more_loss_than_transparent() -> None:
    steps = {"transparent": 0.1, "balanced": 0.2, "fast": 0.4}
    codec = Coded("entropy", {quality: {"step": step} for quality, step in steps.items()}, 4.0)
    slow = crossing(Link(1e6, 1e-3), GPU)
    for quality in steps:
        fine, hidden = (choose(slow, quality, role, (RAW, codec)) for role in ("fine", "hidden"))  # type: ignore[arg-type]
        assert fine is not None and fine.settings == {"step": 0.1}
        assert hidden is not None and hidden.settings == {"step": steps[quality]}
    assert chosen(slow, "lossless", role="fine") == "lossless"
    few = crossing(Link(1e8, 0.1), elements=64 * 1024)
    assert chosen(few, "fast", "fine", (RAW, codec)) == "raw", "coding few bytes gains nothing"


def test_a_peer_without_the_codec() -> None:
    peer = {"raw": {}}
    slow = crossing(Link(1e6, 1e-3))
    choice = DefaultCodecChoice().mesh_choose_codec("hidden", slow.link, "fast", (RAW, ENTROPY), peer, slow)
    assert choice is not None and choice.codec == "raw"
    assert DefaultCodecChoice().mesh_choose_codec("hidden", slow.link, "fast", (RAW, ENTROPY), {}, slow) is None


@pytest.mark.parametrize("current", ["raw", "entropy"])
def test_near_the_balance_what_is_in_use_stays(current: str) -> None:
    even = Link(KLEIN * 1.5 / (2 * KLEIN * 2 / 150e6), 0.0)
    facts = crossing(even, current=CodecChoice(current, {"step": 0.2} if current == "entropy" else {}))
    codecs = (RAW, ENTROPY)
    assert chosen(facts, codecs=codecs) == current
    assert chosen(replace(facts, link=Link(even.bandwidth / 4, 0.0)), codecs=codecs) == "entropy"
    assert chosen(replace(facts, link=Link(even.bandwidth * 8, 0.0)), codecs=codecs) == "raw"


def test_a_codec_of_which_nothing_is_known_waits_unless_it_is_the_only_one() -> None:
    facts = crossing(Link(1e6, 1e-3), Book())
    assert chosen(facts) == "raw"
    alone = choose(facts, codecs=(ENTROPY,))
    assert alone is not None and (alone.codec, alone.reason) == ("entropy", "entropy, not measured yet")


def test_milliseconds_are_not_worth_a_change() -> None:
    facts = crossing(GIGABIT, GPU, elements=64 * 1024, current=CodecChoice("raw"))
    assert chosen(facts) == "raw" and chosen(replace(facts, current=None)) == "entropy"
