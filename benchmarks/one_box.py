"""One machine, two processes: what does a state cost on its way between them, through the socket and in memory?

    python -m benchmarks.one_box                                       # processor: rates of the ways, in one run
    python -m benchmarks.one_box --devices cuda:0 cuda:1 --save benchmarks/results/one-box.md
    python -m benchmarks.one_box --devices cuda:0 cuda:0 --geometry klein-4b

The rounds of all ways alternate, so that all see the same machine. With devices it also hands tensors from GPU to GPU
and checks them bit for bit, in memory of either GPU, with and without their reaching each other's memory, after the
other process was killed; and times steps of a transformer of real size, cut in the middle, beside the uncut one.
``--allocator`` has torch allocate in another way: what it gives out then could not be exported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

ALLOCATORS = {"default": "", "expandable": "expandable_segments:True", "async": "backend:cudaMallocAsync"}
SWITCH = "MESH_SHARED_MEMORY"
STATE = 4608 * 4096 * 2
"""Bytes: a picture of 1024x1024 with 512 text tokens in a model 4096 wide, in bfloat16."""

SIZES = {"38 MB": STATE, "2 MB": 2 << 20, "64 KB": 64 << 10}
SMALL_TURNS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--devices", nargs=2, default=None, metavar=("HOST", "WORKER"))
    parser.add_argument("--geometry", default="klein-9b")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--allocator", choices=ALLOCATORS, default="default")
    parser.add_argument("--no-steps", action="store_true", help="no transformer, which takes minutes to prepare")
    parser.add_argument("--folder", default=None, help="where the temporary checkpoint goes")
    parser.add_argument("--save", type=Path, default=None, help="markdown file; a .json goes beside it")
    arguments = parser.parse_args()
    if ALLOCATORS[arguments.allocator]:
        # Both names: torch has changed it. Read when torch is imported, here and in the worker.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATORS[arguments.allocator]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mesh-bench-", dir=arguments.folder)))
        os.environ["MESH_HOME"] = str(folder / "home")
        report: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count(), "rates": rates(arguments)}
        if arguments.devices:
            report["handed_over"] = hand_over(*arguments.devices)
            if not arguments.no_steps:
                report |= steps(arguments, folder, stack)
    text = markdown(report, arguments)
    print(text)
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(text + "\n", encoding="utf-8")
        arguments.save.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


# The processor: rates of the ways.


def echo(pipe: Connection, insecure: bool) -> None:
    from mesh_core.transport.zeromq import ZeroMqTransport

    listener = ZeroMqTransport().listen("mesh://127.0.0.1:0", insecure=insecure)
    pipe.send(listener.address)
    while True:
        got = listener.receive(60)
        if got is not None:
            listener.send(got[0].route, got[1])


@contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """The pipe to a process that runs ``target``; killed at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def rates(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """GB/s of the bytes that cross there and back, and microseconds of a small message there and back."""
    import numpy as np

    from mesh_core.transport.base import Address
    from mesh_core.transport.zeromq import ZeroMqTransport

    found: dict[str, dict[str, list[float]]] = {}
    with child(echo, False) as coded, child(echo, True) as plain:
        address = coded.recv()
        ways = {
            "loopback, encrypted": ZeroMqTransport(shared=0).connect(Address(address), 20),
            "loopback, plain": ZeroMqTransport(shared=0).connect(Address(plain.recv()), 20),
            "shared memory": ZeroMqTransport().connect(Address(address), 20),
        }
        payloads = {name: np.random.default_rng(0).integers(0, 256, n, np.uint8).data for name, n in SIZES.items()}
        target = np.empty(STATE, np.uint8)
        for number in range(arguments.rounds + 2):
            for way, channel in ways.items():
                seen = {size: _rate(channel, payload) for size, payload in payloads.items()}
                seen["small"] = _small(channel)
                if number >= 2:  # the first ones take the memory from the system
                    for size, value in seen.items():
                        found.setdefault(way, {}).setdefault(size, []).append(value)
            began = perf_counter()
            np.copyto(target, payloads["38 MB"])
            copied = found.setdefault("a copy within a process", {}).setdefault("38 MB", [])
            copied.append(STATE / 1e9 / (perf_counter() - began))
        assert ways["shared memory"].way, "this system shares no memory"
        for channel in ways.values():
            channel.close()
    rows = []
    for way, sizes in found.items():
        row: dict[str, Any] = {"way": way}
        for size, values in sizes.items():
            row |= {f"{size} median": median(values), f"{size} best": (min if size == "small" else max)(values)}
        rows.append(row)
    return rows


def _rate(channel: Any, payload: memoryview) -> float:
    turns = max(1, (4 << 20) // payload.nbytes)
    began = perf_counter()
    for _ in range(turns):
        channel.send([b"header", payload])
        got = channel.receive(60)
        assert got is not None and got[1].nbytes == payload.nbytes
    return turns * 2 * payload.nbytes / 1e9 / (perf_counter() - began)


def _small(channel: Any) -> float:
    began = perf_counter()
    for _ in range(SMALL_TURNS):
        channel.send([b"header", b"x"])
        assert channel.receive(60)
    return (perf_counter() - began) / SMALL_TURNS * 1e6


# GPUs: tensors handed over by the codec alone.


def holder(pipe: Connection, device: str, peers: bool) -> None:
    """Decodes what comes to ``device``, and encodes it again from there."""
    import torch

    from mesh_core.crossing.device_codec import DeviceCodec

    torch.zeros(1, device=device)
    codec = DeviceCodec(_driver(peers))
    settings = codec.settings("lossless", codec.capabilities())
    encoder, decoder = codec.encoder(settings), codec.decoder(settings)
    pipe.send("ready")
    while True:
        coded = pipe.recv()
        began = perf_counter()
        tensor = decoder.decode(coded, device)
        decoded = perf_counter()
        back = encoder.encode(tensor)
        pipe.send((_portable(back), (decoded - began) * 1e3, (perf_counter() - decoded) * 1e3))


def _driver(peers: bool) -> Any:
    from mesh_core.crossing.device_driver import _NO_PEERS, CudaDriver, _DriverError

    class Apart(CudaDriver):
        """As where GPUs cannot reach each other's memory: opened on the GPU that has it."""

        def _opened(self, device: Any, handle: bytes) -> Any:
            if not self.__dict__.pop("refused", False):
                self.__dict__["refused"] = True
                raise _DriverError("cuIpcOpenMemHandle_v2", _NO_PEERS)
            return super()._opened(device, handle)

    return CudaDriver() if peers else Apart()


def _portable(coded: Any) -> Any:
    from dataclasses import replace

    return replace(coded, buffers=[bytes(b) for b in coded.buffers], owner=None)


def hand_over(here: str, there: str) -> list[dict[str, Any]]:
    """Tensors there and back between two processes: exact, and milliseconds of each part; and memory given back."""
    import torch

    from mesh_core.crossing.device_codec import DeviceCodec

    torch.zeros(1, device=here)
    codec, rows = DeviceCodec(), []
    settings = codec.settings("lossless", codec.capabilities())
    free = torch.cuda.mem_get_info(here)[0]
    for peers in (True, False):
        row: dict[str, Any] = {"opened on": "the reader's GPU" if peers else "the owner's GPU"}
        try:
            with child(holder, there, peers) as pipe:
                encoder, decoder = codec.encoder(settings), codec.decoder(settings)
                pipe.recv()
                states = [torch.randn(1, 4608, 4096, device=here).to(dtype) for dtype in (torch.bfloat16,) * 12]
                states += [torch.randn(777, 333, device=here), torch.randn(64, 4096, device=here).half().t()]
                states += [torch.randn(300, 300, device=here) > 0, torch.zeros(0, 5, device=here)]
                parts: list[tuple[float, ...]] = []
                exact = True
                for state in states:
                    began = perf_counter()
                    coded = encoder.encode(state)
                    encoded = perf_counter()
                    pipe.send(_portable(coded))
                    assert pipe.poll(60), "no answer"
                    back, decode_there, encode_there = pipe.recv()
                    came = perf_counter()
                    result = decoder.decode(back, here)
                    ended = perf_counter()
                    exact &= bool(torch.equal(result, state)) and result.dtype == state.dtype
                    if state.shape == states[0].shape:
                        parts.append(((encoded - began) * 1e3, decode_there, encode_there, (ended - came) * 1e3))
                        assert not coded.buffers and not back.buffers, "a large state was not handed over in memory"
                names = ("encode here", "decode there", "encode there", "decode here")
                row |= {"exact": exact} | {
                    name: median(p) for name, p in zip(names, zip(*parts[2:], strict=True), strict=True)
                }
                del states, state, result, encoder, decoder, back, coded
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        # The other process is killed: what it had open is given back.
        sleep(1.0)
        torch.cuda.empty_cache()
        row["MB not given back"] = max(0.0, (free - torch.cuda.mem_get_info(here)[0]) / 1e6)
        rows.append(row)
    return rows


# GPUs: steps of a split model.


def steps(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Any]:
    import torch

    from benchmarks.split_on_gpu import forward_of, generate, random_model, start_worker
    from benchmarks.two_gpus import Cell, builder, copy_ms, inputs_of, tried
    from mesh_core.builtin import installed_plugins
    from mesh_core.model.checkpoint import read_header
    from mesh_core.model.library import recognise
    from mesh_core.model.spans import BlockSpan
    from mesh_core.programs.identity import identify
    from mesh_core.system.device import label

    here, there = (torch.device(d) for d in arguments.devices)
    model = random_model(arguments.geometry, here)
    model.save_pretrained(folder / "models" / arguments.geometry, max_shard_size="8GB")
    checkpoint = recognise(read_header(folder / "models" / arguments.geometry), installed_plugins())
    identity = identify(checkpoint)
    inputs = inputs_of(model, arguments.pixels, 1, here)
    generate(forward_of(model), inputs, 2, here)
    uncut = generate(forward_of(model), inputs, 4, here)
    copied = copy_ms(model, arguments.pixels, 1, here, there)
    del model
    torch.cuda.empty_cache()
    worker = start_worker(stack, folder, "worker", arguments.devices[1])
    build = builder(checkpoint, here)
    whole, half = build(BlockSpan(0, checkpoint.spec.blocks)), checkpoint.spec.blocks // 2
    rows = []
    for cut in (half, half // 2):
        for way, quality, codec, switch in (
            ("GPU memory", "lossless", None, None),
            ("shared memory", "lossless", "raw", None),
            ("loopback, encrypted", "lossless", "raw", "0"),
            ("left open", "transparent", None, None),
        ):
            if switch is None:
                os.environ.pop(SWITCH, None)
            else:
                os.environ[SWITCH] = switch
            # Exactness is looked at where as many steps are made as of the uncut model.
            for number in (4, arguments.steps):
                cell = Cell(arguments.pixels, 1, number, cut, quality, codec)
                rows.append({"way": way, **tried(cell, checkpoint, identity, worker, inputs, uncut, here, build)})
    os.environ.pop(SWITCH, None)
    del whole
    return {
        "geometry": arguments.geometry,
        "devices": [label(here), label(there)],
        "torch": torch.__version__,
        "uncut_ms": uncut[1],
        "copy_ms": copied,
        "steps": rows,
    }


COLUMNS = ("way", "cut", "quality", "steps", "exact", "ms_per_step", "of_uncut", "MB_per_step", "codec_ms", "wire_ms")
COLUMNS = (*COLUMNS, "overhead_ms", "chosen", "error")


def markdown(report: dict[str, Any], arguments: argparse.Namespace) -> str:
    lines = ["# Two processes of one machine", "", f"{report['machine']}, {report['cores']} cores.", ""]
    lines += [
        "Through messages there and back, GB/s of the bytes of both directions; small messages: microseconds.",
        "",
    ]
    lines += table(report["rates"])
    if "handed_over" in report:
        lines += ["", f"A state of 38 MB from {' to '.join(arguments.devices)} and back, milliseconds:", ""]
        lines += table(report["handed_over"])
    if "steps" in report:
        what = f"{report['geometry']}, random weights, {arguments.pixels} pixels, {' and '.join(report['devices'])}"
        lines += ["", f"{what}; torch {report['torch']}, allocator: {arguments.allocator}."]
        lines += [f"Uncut {report['uncut_ms']:.1f} ms a step; a copy from GPU to GPU {report['copy_ms']:.2f} ms.", ""]
        lines += table([{name: row[name] for name in COLUMNS if name in row} for row in report["steps"]])
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)

    head = ["| " + " | ".join(n.replace("_", " ") for n in names) + " |", "|" + "---|" * len(names)]
    return head + ["| " + " | ".join(cell(row.get(n)) for n in names) + " |" for row in rows]


if __name__ == "__main__":
    main()
