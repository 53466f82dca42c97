"""State to message and back: exactly as agreed, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mesh_codec import EntropyCodec, RawCodec
from mesh_codec.base import Buffer, CodecChoice, DecodeLimits
from mesh_codec.errors import CodecCorrupt
from mesh_core.crossing.sequences import Turn
from mesh_core.crossing.streams import Streams, aligned
from mesh_core.errors import WireMalformed

CODECS = {"raw": RawCodec(), "entropy": EntropyCodec()}
CPU = torch.device("cpu")
RAW = CodecChoice("raw")
FIRST = Turn("", 1)


def lossy(quality: str) -> CodecChoice:
    codec = CODECS["entropy"]
    return CodecChoice("entropy", codec.settings(quality, codec.capabilities()))  # type: ignore[arg-type]


def streams(**choices: CodecChoice) -> Streams:
    return Streams(choices, CODECS, DecodeLimits())


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"hidden": torch.randn(2, 50, 64).to(torch.bfloat16), "temb": torch.randn(2, 64)}


def test_what_goes_in_comes_out_bit_for_bit() -> None:
    sent = state()
    payload = streams(hidden=RAW, temb=RAW).encode(FIRST, sent)
    got = streams(hidden=RAW, temb=RAW).decode(FIRST, payload.entries, payload.buffers, CPU)
    assert got.keys() == sent.keys() and all(torch.equal(got[n], sent[n]) for n in sent)
    assert payload.raw_bytes == payload.coded_bytes == 2 * 50 * 64 * 2 + 2 * 64 * 4


def test_each_tensor_is_coded_as_agreed_for_it() -> None:
    choices = {"hidden": lossy("balanced"), "temb": RAW}
    sent = state()
    payload = streams(**choices).encode(FIRST, sent)
    got = streams(**choices).decode(FIRST, payload.entries, payload.buffers, CPU)
    assert torch.equal(got["temb"], sent["temb"]) and not torch.equal(got["hidden"], sent["hidden"])
    assert payload.coded_bytes < 0.6 * payload.raw_bytes


def tampered(change: str) -> tuple[list[dict[str, Any]], list[Buffer]]:
    payload = streams(hidden=RAW, temb=RAW).encode(FIRST, state())
    entries, buffers = [dict(e) for e in payload.entries], list(payload.buffers)
    if change == "another codec":
        other = streams(hidden=lossy("fast"), temb=RAW).encode(FIRST, state())
        entries, buffers = [dict(e) for e in other.entries], list(other.buffers)
    elif change == "another setting":
        entries[0]["s"] = {"step": 1}
    elif change == "an unknown tensor":
        entries[0]["n"] = "surprise"
    elif change == "a tensor twice":
        entries, buffers = [*entries, entries[0]], [*buffers, buffers[0]]
    elif change == "too few buffers":
        buffers = buffers[:1]
    elif change == "too many buffers":
        buffers = [*buffers, b"more"]
    elif change == "a count that lies":
        entries[1]["k"] = 5
    return entries, buffers


CHANGES = [
    "another codec",
    "another setting",
    "an unknown tensor",
    "a tensor twice",
    "too few buffers",
    "too many buffers",
    "a count that lies",
]


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_than_agreed_is_refused(change: str) -> None:
    entries, buffers = tampered(change)
    with pytest.raises((WireMalformed, CodecCorrupt)):
        streams(hidden=RAW, temb=RAW).decode(FIRST, entries, buffers, CPU)


def test_a_codec_that_is_not_installed_is_named() -> None:
    with pytest.raises(WireMalformed, match="nvenc"):
        streams(hidden=CodecChoice("nvenc"))


def test_a_tensor_at_an_odd_place_in_a_message_is_moved_to_where_kernels_expect_it() -> None:
    memory = torch.zeros(4096, dtype=torch.uint8)
    start = (-memory.data_ptr()) % 64 + 4
    odd = memory[start : start + 256].view(torch.float32)
    even = memory[start + 60 : start + 60 + 256].view(torch.float32)
    assert aligned(odd).data_ptr() % 64 == 0 and torch.equal(aligned(odd), odd)
    assert aligned(even) is even
