"""Tensors handed over in the memory of a device: what arrives, what happens when memory is short, and who lies."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

import pytest
import torch

from mesh_codec.base import DecodeLimits, Encoded
from mesh_codec.errors import CodecCorrupt, CodecUnsupported
from mesh_codec.memory import bytes_of
from mesh_codec.testing import check_codec
from mesh_core.crossing.codec_timing import time_codec
from mesh_core.crossing.device_codec import DeviceCodec
from mesh_core.crossing.device_driver import CudaDriver
from mesh_core.transport.memory_link import SWITCH
from tests.support.shared_device import EmulatedDevice
from tests.support.workers import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memory without a name")

SETTINGS = {"format": "emulated-1"}
STATE = torch.arange(1 << 16, dtype=torch.float32).reshape(256, 256)


def decoding(pipe: Connection) -> None:
    """A process that decodes what comes: sends the tensor's bytes back, or the name of an error."""
    driver = EmulatedDevice()
    decoder = DeviceCodec(driver).decoder(SETTINGS)
    while (encoded := pipe.recv()) is not None:
        try:
            tensor = decoder.decode(encoded)
            pipe.send((bytes_of(tensor).tobytes(), len(driver.opened)))
        except Exception as error:
            pipe.send((type(error).__name__, len(driver.opened)))


class Other:
    """The other process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=decoding, args=(theirs,), daemon=True)
        self.process.start()

    def decode(self, encoded: Encoded) -> Any:
        self._pipe.send(replace(encoded, buffers=[bytes(b) for b in encoded.buffers], owner=None))
        assert self._pipe.poll(60), "no answer"
        result, self.opened = self._pipe.recv()
        return result


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    made = Other()
    yield made
    made.process.kill()
    made.process.join()


def test_a_state_crosses_without_a_byte_on_the_wire(other: Other) -> None:
    driver = EmulatedDevice()
    encoder = DeviceCodec(driver).encoder(SETTINGS)
    for step in range(5):
        coded = encoder.encode(STATE + step)
        assert coded.buffers == () and coded.header["dtype"] == "float32" and coded.header["shape"] == [256, 256]
        assert other.decode(coded) == (STATE + step).numpy().tobytes()
    assert len(driver.allocated) == 1 and driver.copies == 5 and other.opened == 1


def test_what_nobody_reads_crosses_as_raw_and_a_key_frame_has_memory_again(other: Other) -> None:
    encoder = DeviceCodec(EmulatedDevice()).encoder(SETTINGS)
    sizes = [encoder.encode(STATE).nbytes for _ in range(4)]
    assert sizes == [0, 0, STATE.nbytes, STATE.nbytes]
    assert other.decode(encoder.encode(STATE)) == STATE.numpy().tobytes()
    encoder.reset()
    assert encoder.encode(STATE).nbytes == 0


def test_small_tensors_and_those_for_which_there_is_no_memory_cross_as_raw(other: Other) -> None:
    encoder = DeviceCodec(EmulatedDevice(most=1000)).encoder(SETTINGS)
    for tensor in (STATE, STATE[:2], torch.zeros(0, 3), torch.tensor(5)):
        assert other.decode(encoder.encode(tensor)) == tensor.numpy().tobytes()


def test_other_shapes_types_and_strides(other: Other) -> None:
    driver = EmulatedDevice()
    encoder = DeviceCodec(driver).encoder(SETTINGS)
    for tensor in (
        STATE,
        STATE.t(),
        STATE[:, 3:200:2],
        STATE.bfloat16(),
        STATE.repeat(20, 1),
        STATE > 5,
        torch.view_as_complex(STATE.reshape(-1, 2)).conj(),
    ):
        coded = encoder.encode(tensor)
        assert other.decode(coded) == bytes_of(tensor.resolve_conj().contiguous())
    del encoder, coded


def test_memory_is_given_back_when_the_other_process_has_closed_it_or_is_gone() -> None:
    driver, other = EmulatedDevice(), Other()
    codec = DeviceCodec(driver)
    first, second = codec.encoder(SETTINGS), codec.encoder(SETTINGS)
    other.decode(first.encode(STATE))
    assert len(driver.allocated) == 1
    del first
    gc.collect()
    other.decode(second.encode(STATE))  # the one before is closed with the first of another
    wait_until(lambda: len(driver.allocated) == 1, 5, "the first memory to be given back")
    del second
    gc.collect()
    other.process.kill()
    other.process.join()
    wait_until(lambda: not driver.allocated, 5, "the memory to be given back")


def test_within_one_process_it_is_timed_as_any_codec() -> None:
    driver = EmulatedDevice()
    speed = time_codec(DeviceCodec(driver), SETTINGS, torch.bfloat16, torch.device("cpu"))
    assert speed.exact and speed.bits == 0 and driver.copies > 2 and not driver.opened


def test_it_does_what_codecs_do() -> None:
    check_codec(DeviceCodec(EmulatedDevice()))


def changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda memory: {**memory, **changes}


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda memory: {k: v for k, v in memory.items() if k != key}


LIES = {
    "a slot that is not there": changed(slot=2),
    "a slot before the first": changed(slot=-1),
    "a slot so large that the next is outside": changed(slot=1, size=(4 << 20) - 10),
    "slots so large that numbers overflow": changed(slot=1, size=1 << 62),
    "no number": changed(slot="0"),
    "truth for a number": changed(slot=True),
    "a use that is none": changed(use=-1),
    "a short handle": changed(handle=b"x"),
    "no handle": without("handle"),
    "a long place": changed(place="x" * 100),
    "no label": without("label"),
    "a label of another length": changed(label=b"x"),
    "a negative process": changed(maker=-1),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_before_anything_is_read(other: Other, lie: str) -> None:
    encoder = DeviceCodec(EmulatedDevice()).encoder(SETTINGS)
    coded = encoder.encode(STATE)
    fresh = {**coded.header["memory"], "label": os.urandom(16)}
    damaged = replace(coded, header={**coded.header, "memory": LIES[lie](fresh)})
    assert other.decode(damaged) == "CodecCorrupt"
    assert other.decode(coded) == STATE.numpy().tobytes()


def test_a_shape_larger_than_the_memory_is_refused(other: Other) -> None:
    encoder = DeviceCodec(EmulatedDevice()).encoder(SETTINGS)
    coded = encoder.encode(STATE)
    assert other.decode(replace(coded, header={**coded.header, "shape": [1 << 21]})) == "CodecCorrupt"
    assert other.decode(replace(coded, header={**coded.header, "memory": 5})) == "CodecCorrupt"
    assert other.decode(replace(coded, buffers=(b"x",))) == "CodecCorrupt"
    limited = DeviceCodec(EmulatedDevice()).decoder(SETTINGS, DecodeLimits(max_elements=10))
    with pytest.raises(CodecCorrupt, match="limit"):
        limited.decode(coded)


@pytest.mark.parametrize("what", ["flags", "handle", "maker"])
def test_memory_that_cannot_be_opened_is_unsupported(other: Other, what: str) -> None:
    """The host then sends all as raw."""
    memory = {"flags": 1 << 20, "maker": 1 << 30, "handle": bytes(64)}
    encoder = DeviceCodec(EmulatedDevice()).encoder(SETTINGS)
    coded = encoder.encode(STATE)
    said = {**coded.header["memory"], "label": os.urandom(16), what: memory[what]}
    assert other.decode(replace(coded, header={**coded.header, "memory": said})) == "CodecUnsupported"


def test_memory_that_its_maker_keeps_locked_is_not_waited_for(other: Other) -> None:
    import fcntl

    encoder = DeviceCodec(EmulatedDevice()).encoder(SETTINGS)
    coded = encoder.encode(STATE)
    fcntl.flock(coded.header["memory"]["flags"], fcntl.LOCK_EX)
    began = monotonic()
    assert other.decode(coded) == "CodecUnsupported"
    assert monotonic() - began < 5


def test_it_is_offered_only_where_both_ends_can(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = DeviceCodec(EmulatedDevice())
    assert codec.settings("lossless", codec.capabilities()) == SETTINGS
    with pytest.raises(CodecUnsupported):
        codec.settings("lossless", {"formats": []})
    with pytest.raises(CodecUnsupported):
        codec.encoder({"format": "cuda-ipc-1"})
    monkeypatch.setenv(SWITCH, "0")
    assert codec.capabilities() == {"formats": []}
    if not torch.cuda.is_available():
        assert not CudaDriver().available()
