"""Codecs on a CUDA device, timed in one run: the entropy codec's engines, prediction, and video engines.

Data is made here: hidden states of unlike, partly massive channels, each differing from the one before as neighbouring
steps do. Rates and speeds are about those of real activations; what an error does to a picture is another benchmark's.
Before anything is timed, the fused kernels are compared with the same arithmetic in plain torch, and pictures that
NVDEC decodes with those of FFmpeg, bit for bit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from mesh_codec.ans.checksum import PERIOD
from mesh_codec.ans.chunks import frame_size, pack, table_size
from mesh_codec.ans.dispatch import write_outside
from mesh_codec.ans.findings import DeviceFindings
from mesh_codec.ans.lattice import RADIUS, Lattice, measure
from mesh_codec.ans.nvcomp import NvComp
from mesh_codec.ans.stream import AnsDecoder, AnsEncoder
from mesh_codec.base import Codec, DecodeLimits, Decoder, Encoded, Encoder
from mesh_codec.entropy import EntropyCodec
from mesh_codec.hevc.codec import HevcCodec
from mesh_codec.hevc.engines import Engines
from mesh_codec.hevc.nvvideo import NvVideoEngine
from mesh_codec.hevc.pyav import PyAvEngine
from mesh_codec.lossless import LosslessCodec
from mesh_core.errors import ConfigError

T = TypeVar("T")

SHAPES = ((4096, 4096), (4608, 6144), (8192, 4096))
"""A 1024x1024 picture 4096 wide, one 6144 wide with its text, a video of 121 frames."""

_STEP = 0.2
_CHANGE = 0.15
"""Of the deviation, from one tensor to the next: as in the middle of 8 to 28 steps."""

_WARM, _TIMED = 4, 20
_SLOW_TIMED = 6
_QPS = (10, 18)


@dataclass(frozen=True)
class EngineTiming:
    """Medians of a codec on one shape.

    Attributes:
        encode_ms, decode_ms: by CUDA events; None where it was not timed.
        bits: per element.
        error: in deviations of the typical channel.
        note: what else was seen.
    """

    shape: tuple[int, int]
    codec: str
    encode_ms: float | None
    decode_ms: float | None
    bits: float
    error: float
    note: str = ""


def run(
    device: torch.device, shapes: Sequence[tuple[int, int]] = SHAPES, *, video: bool = True
) -> Iterator[EngineTiming]:
    """The rows as they are measured.

    Raises:
        ConfigError: ``device`` is no CUDA device, or this machine has none.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(
            f"There is nothing to measure on {device}: this needs an NVIDIA GPU and a PyTorch built for CUDA.",
            hint="mesh bench codec, without --device, measures on the CPU",
        )
    check_kernels(device)
    for shape in shapes:
        tensors = states(shape, device)
        yield from _entropy_rows(shape, tensors, device)
        if video:
            yield from _video_rows(shape, tensors, device)


def states(shape: tuple[int, int], device: torch.device, count: int = 4) -> list[Tensor]:
    """bfloat16 [tokens, channels], of which each differs from the one before by `_CHANGE` deviations."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    tokens, channels = shape
    gains = (noise(channels) * 0.6).exp()
    gains[:: channels // 4] *= 40
    rank = channels // 16
    spectrum = torch.arange(1, rank + 1, device=device) ** -0.5
    current = 0.7 * ((noise(tokens, rank) * spectrum) @ noise(rank, channels) / spectrum.norm()) + 0.7 * noise(*shape)
    offset = noise(channels)
    found = []
    for _ in range(count):
        found.append(((current + offset) * gains).bfloat16())
        found[-1][tokens // 3] *= 30
        current = current * (1 - _CHANGE**2) ** 0.5 + _CHANGE * noise(*shape)
    return found


def check_kernels(device: torch.device) -> None:
    """Compare the kernels on ``device`` with plain torch on the CPU: exactly, but for what only the encoder measures.

    Raises:
        ConfigError: a kernel does something else.
    """
    from mesh_codec.ans import kernels, measure_kernels

    # Neither size fills its last tile.
    first, second = (t.cpu() for t in states((200, 72), device, 2))
    first[3, 4], first[5, 6], first[:, 7] = torch.nan, torch.inf, 0.3
    findings, there = (DeviceFindings(first.shape[1], first.numel(), torch.device(d)) for d in ("cpu", device))
    measure(first, _STEP, findings)
    settled = measure_kernels.settle(measure_kernels.describe(first.to(device), there.means), _STEP, there, RADIUS)
    # Encoder and decoder get at the same tables in two ways.
    _all_same(settled, kernels.tables(there.ranks, there.means, there.step, RADIUS))
    for name in ("ranks", "means", "step"):
        _same(getattr(findings, name).double(), getattr(there, name).cpu().double(), 2e-2)
    plain = Lattice.of(findings.ranks, findings.means, findings.step)
    tables = kernels.tables(findings.ranks.to(device), findings.means.to(device), findings.step.to(device), RADIUS)
    _same(plain.place, tables[0].cpu(), 0)
    _same(plain.scales, tables[2].cpu(), 1e-6)
    # What a device rounds last stays on it: here both must quantise alike.
    fused = Lattice(tables[0], tables[1], plain.scales.to(device), plain.inverse.to(device))
    held, kept = (lattice.empty(len(first)).zero_() for lattice in (plain, fused))
    for tensor in (first, second):
        tokens = tensor.to(device)
        sizes = measure_kernels.compare(tokens, kept, fused.place, fused.means, fused.inverse, 17)
        _same(plain.compare(tensor, held, 17), sizes.cpu(), 1e-3)
        before, restored = held.clone(), kept.clone()
        symbols, coded = plain.quantise(tensor, held, findings), kernels.quantise(fused, tokens, kept, there, PERIOD)
        number, flat = int(findings.count), coded.view(torch.uint8).view(-1)
        values = plain.restore(symbols, before, findings.predicted, tensor.dtype)
        back = kernels.restore(fused, coded, restored, there.predicted, tensor.dtype)
        wanted: list[Tensor] = [symbols, held, findings.count, findings.listed[:number], findings.total, findings.total]
        listed, summed = there.listed[:number].sort().values, torch.zeros_like(there.total)
        kernels.checksum(flat, summed, PERIOD)
        write_outside(values, findings.listed[:number])
        kernels.write_listed(back, there.listed[:number])
        got: list[Tensor] = [coded, kept, there.count, listed, there.total, summed]
        if not findings.predicted.any():
            fresh = DeviceFindings(first.shape[1], first.numel(), device)
            wanted.append(symbols)
            got.append(kernels.quantise(fused, tokens, None, fresh, PERIOD))
        _all_same(wanted, got)
        _same(values.float(), back.cpu().float(), torch.finfo(tensor.dtype).eps)
        findings, there = (DeviceFindings(first.shape[1], first.numel(), torch.device(d)) for d in ("cpu", device))
        for end in (findings, there):
            end.predicted[:] = torch.arange(first.shape[1]) % 3 != 0
    _check_packing(device)


def _check_packing(device: torch.device) -> None:
    """More chunks than a program of the kernel adds up at a time, and larger ones than it moves at a time."""
    from mesh_codec.ans import kernels

    generator = torch.Generator().manual_seed(0)
    count, room = 135, 20_000
    rooms = torch.randint(256, (count * room,), generator=generator, dtype=torch.uint8)
    sizes = torch.randint(1, 400, (count,), generator=generator)
    sizes[::100] = torch.randint(room - 50, room + 1, (len(sizes[::100]),), generator=generator)
    statuses = (torch.arange(count) % 50 == 7).int()
    size = frame_size(torch.where(statuses == 0, sizes, 0).numpy())
    expected, found = torch.zeros(2, size, dtype=torch.uint8)
    pack(rooms, sizes, statuses, expected)
    there = found.to(device)
    kernels.pack(rooms.to(device), sizes.to(device), statuses.to(device), there, table_size(count))
    _same(expected, there.cpu(), 0)


def _all_same(expected: Iterable[Tensor], found: Iterable[Tensor]) -> None:
    for one, other in zip(expected, found, strict=True):
        _same(one.cpu(), other.cpu(), 0)


def _same(expected: Tensor, found: Tensor, tolerance: float) -> None:
    if not torch.allclose(expected, found, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ConfigError("A fused kernel and plain torch differ: report this with the GPU's name.")


def _entropy_rows(shape: tuple[int, int], tensors: list[Tensor], device: torch.device) -> Iterator[EngineTiming]:
    engine = NvComp()
    if engine.available():
        exact = LosslessCodec(engine)
        chosen = exact.settings("lossless", exact.capabilities())
        note = _memory(exact.encoder(chosen), exact.decoder(chosen), tensors[0])
        yield _timed(
            shape, "lossless, nvCOMP ANS" if chosen else "lossless, not on this GPU", exact.encoder(chosen),
            exact.decoder(chosen), tensors, _TIMED, note,
        )  # fmt: skip
        for name, temporal in (("entropy, nvCOMP ANS", False), ("entropy + temporal, nvCOMP ANS", True)):
            note = _memory(AnsEncoder(_STEP, temporal, engine), AnsDecoder(DecodeLimits(), engine), tensors[0])
            yield _timed(
                shape,
                name,
                AnsEncoder(_STEP, temporal, engine),
                AnsDecoder(DecodeLimits(), engine),
                tensors,
                _TIMED,
                note,
            )
    else:
        yield EngineTiming(
            shape, "entropy, nvCOMP ANS", None, None, 0.0, 0.0, "no nvCOMP: pip install nvidia-libnvcomp-cu13"
        )
    lossless = LosslessCodec()
    yield _timed(shape, "lossless, portable", lossless.encoder({}), lossless.decoder({}), tensors, 5, "on the CPU")
    portable, settings = EntropyCodec(), {"step": _STEP}
    yield _timed(
        shape, "entropy, portable", portable.encoder(settings), portable.decoder(settings), tensors, 5, "on the CPU"
    )


def _video_rows(shape: tuple[int, int], tensors: list[Tensor], device: torch.device) -> Iterator[EngineTiming]:
    hardware = NvVideoEngine()
    encodes, decodes = hardware.probe()
    software = HevcCodec(Engines([PyAvEngine()]))
    nvdec, both = HevcCodec(Engines([hardware])), HevcCodec(Engines([hardware, PyAvEngine()]))
    for bits in (8, 10):
        for qp in _QPS:
            settings = {"qp": qp, "bits": bits, "strips": max(2, both.capabilities()["engines"])}
            name = f"hevc, {bits} bit, QP {qp}"
            if encodes:
                yield _timed(
                    shape, f"{name}, NVENC and NVDEC", nvdec.encoder(settings), nvdec.decoder(settings), tensors,
                    _SLOW_TIMED, f"{settings['strips']} strips",
                )  # fmt: skip
            if decodes:
                yield _decoded(shape, f"{name}, libx265 and NVDEC", software, nvdec, settings, tensors, device)
            else:
                yield EngineTiming(shape, name, None, None, 0.0, 0.0, "no NVDEC")


def _timed(
    shape: tuple[int, int], name: str, encoder: Encoder, decoder: Decoder, tensors: list[Tensor], count: int, note: str
) -> EngineTiming:
    device, encoding, decoding = tensors[0].device, [], []
    for number in range(_WARM + count):
        # Back and forth, so that each differs from the one before as much.
        tensor = tensors[_there_and_back(number, len(tensors))]
        ms, coded = _events(lambda t=tensor: encoder.encode(t))  # type: ignore[misc]
        encoding.append(ms)
        ms, back = _events(lambda c=coded: decoder.decode(c, device))  # type: ignore[misc]
        decoding.append(ms)
    bits = 8 * coded.nbytes / tensor.numel()
    return EngineTiming(
        shape, name, median(encoding[_WARM:]), median(decoding[_WARM:]), bits, _error(tensor, back), note
    )


def _decoded(
    shape: tuple[int, int], name: str, coding: Codec, decoding: Codec, settings: dict[str, int], tensors: list[Tensor],
    device: torch.device,
) -> EngineTiming:  # fmt: skip
    """NVDEC on a short stream of libx265's, compared with FFmpeg picture by picture."""
    encoder, reference = coding.encoder(settings), coding.decoder(settings)
    coded: list[Encoded] = [encoder.encode(tensor) for tensor in tensors[:3]]
    expected = [reference.decode(payload) for payload in coded]
    decoder, times, same = decoding.decoder(settings), [], True
    for round_ in range(3):
        for number, (payload, picture) in enumerate(zip(coded, expected, strict=True)):
            ms, back = _events(lambda p=payload: decoder.decode(p, device))  # type: ignore[misc]
            same = same and torch.equal(back.cpu().view(torch.int16), picture.view(torch.int16))
            if round_ and number:
                times.append(ms)
    keys = f"key tensor {8 * coded[0].nbytes / tensors[0].numel():.2f} bits"
    note = f"{keys}; {'bit for bit as FFmpeg' if same else 'NOT AS FFMPEG'}; {settings['strips']} strips"
    bits = 8 * coded[-1].nbytes / tensors[0].numel()
    return EngineTiming(shape, name, None, median(times), bits, _error(tensors[2], back), note)


def _there_and_back(number: int, count: int) -> int:
    place = number % (2 * count - 2)
    return min(place, 2 * count - 2 - place)


def _events(work: Callable[[], T]) -> tuple[float, T]:
    """Milliseconds between two events around ``work``, and its result."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), result


def _memory(encoder: Encoder, decoder: Decoder, tensor: Tensor) -> str:
    """What both ends allocate for a first tensor, which costs most: the decoded tensor included, ``tensor`` not."""
    encoding, coded = _peak(lambda: encoder.encode(tensor), tensor.device)
    decoding, _ = _peak(lambda: decoder.decode(coded, tensor.device), tensor.device)
    return (
        f"at most {encoding / tensor.nbytes:.1f} copies while encoding, {decoding / tensor.nbytes:.1f} while decoding"
    )


def _peak(work: Callable[[], T], device: torch.device) -> tuple[int, T]:
    """Bytes that torch allocated at most during ``work``, and its result."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before, result


def _error(tensor: Tensor, back: Tensor) -> float:
    noise = (tensor.double() - back.double()).square().mean(0)
    return float((noise.median() / tensor.double().var(0).median()).sqrt())


def table(rows: Sequence[EngineTiming]) -> str:
    """Markdown."""
    lines = ["| shape | codec | encode ms | decode ms | bits | error | |", "|---|---|---|---|---|---|---|"]

    def ms(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    for row in rows:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        numbers = f"{row.bits:.2f} | {row.error:.3f}" if row.bits else " | "
        lines.append(f"| {shape} | {row.codec} | {ms(row.encode_ms)} | {ms(row.decode_ms)} | {numbers} | {row.note} |")
    return "\n".join(lines)
