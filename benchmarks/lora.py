"""LoRAs on a worker: how fast a strength changes, what a second use sends, and what a transfer costs other sessions.

    python -m benchmarks.lora                                   # tiny-klein on the CPU
    python -m benchmarks.lora --geometry klein-9b --device cuda --rank 128 --large 0

All blocks run in one worker process, reached over encrypted loopback. In one run: loading the span from disk, which is
what a changed strength costs where LoRAs are baked in at loading; then the first use of a LoRA on every linear layer
and changes of its strength; then a large LoRA that is sent, used again by a new session, and used once more by one
that asks for it with another strength; then steps of another session, without and during such a transfer.
"""

from __future__ import annotations

import argparse
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.split_on_gpu import pictures, random_inputs, random_model, report_and_save, start_worker

TINY = Path(__file__).parents[1] / "examples" / "tiny-klein" / "model" / "transformer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=["tiny-klein", *pictures()], default="tiny-klein")
    parser.add_argument("--size", type=int, default=128, help="pixels of a step's picture")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--large", type=int, default=1000, help="megabytes of the large LoRA; 0 leaves it out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", default="30GB", help="of the worker: less than two models keeps one in host memory")
    parser.add_argument("--folder", default=None, help="where the temporary checkpoint goes")
    parser.add_argument("--save", type=Path, default=None, help="markdown file; a .json goes beside it")
    arguments = parser.parse_args()
    report_and_save(arguments, lambda *given: Bench(*given).run(), markdown)


class Bench:
    def __init__(self, arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        import torch
        from diffusers import Flux2Transformer2DModel

        from mesh_core.builtin import installed_plugins
        from mesh_core.model.checkpoint import read_header
        from mesh_core.model.library import recognise
        from mesh_core.system.config import Loras, Settings

        self.arguments, self.folder = arguments, folder
        self.settings = Settings(loras=Loras(policy="always-send"))
        self.device, self.plugins = torch.device(arguments.device), installed_plugins()
        path = folder / "models" / "model"
        if arguments.geometry == "tiny-klein":
            model: Any = Flux2Transformer2DModel.from_pretrained(TINY)
            self.dtype = torch.float32
        else:
            model, self.dtype = random_model(arguments.geometry, self.device), torch.bfloat16
        model.save_pretrained(path)
        self.inputs = {n: t if t.dtype == torch.int64 else t.to(self.dtype) for n, t in self._inputs(model).items()}
        self.layers = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        del model
        self.checkpoint = recognise(read_header(path), self.plugins)
        self.address = start_worker(stack, folder, "worker", arguments.device, arguments.memory)

    def _inputs(self, model: Any) -> dict[str, Any]:
        return random_inputs(model, self.arguments.size, self.device)

    def lora(self, rank: int, seed: int) -> Any:
        """A LoRA of every linear layer, read from a file."""
        import torch
        from safetensors.torch import save_file

        from mesh_core.loras.read import read_lora

        generator, state = torch.Generator().manual_seed(seed), {}
        for name, (rows, columns) in self.layers.items():
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).to(self.dtype)
            up = torch.randn(rows, rank, generator=generator) * 0.01
            state[f"transformer.{name}.lora_B.weight"] = up.to(self.dtype)
        save_file(state, self.folder / f"lora{seed}.safetensors")
        return read_lora(self.folder / f"lora{seed}.safetensors", self.checkpoint)

    @contextmanager
    def session(self) -> Any:
        """A runner with everything on the worker, and the bytes that this host sent."""
        from mesh_core.host.options import SessionOptions
        from mesh_core.host.runner import SplitRunner, open_session, place
        from mesh_core.model.numerics import Numerics
        from mesh_core.model.weights import WeightReader
        from mesh_core.programs.identity import identify

        options = SessionOptions(Numerics(self.dtype), self.device, settings=self.settings)
        placement = place(self.checkpoint, ":0", [self.address], self.plugins, options, None)
        session = open_session(lambda: identify(self.checkpoint), placement, options, self.plugins, None)
        local = self.checkpoint.adapter.build_stage(
            self.checkpoint.spec,
            placement.plan.local,
            WeightReader(self.checkpoint.header),
            device=self.device,
            numerics=Numerics(self.dtype),
        )
        runner = SplitRunner(self.checkpoint, placement.plan, local, session)
        channel, sent = placement.remotes[0].channel, [0]
        send = channel.send

        def counting(frames: Any) -> None:
            sent[0] += sum(memoryview(f).nbytes for f in frames)
            send(frames)

        channel.send = counting
        try:
            yield runner, sent
        finally:
            runner.close()

    def run(self) -> dict[str, Any]:
        import torch

        from mesh_core.system.device import label

        report: dict[str, Any] = {
            "geometry": self.arguments.geometry,
            "device": label(self.device),
            "worker_memory": self.arguments.memory,
            "torch": torch.__version__,
        }
        began = perf_counter()
        with self.session() as (runner, sent):
            report["load_ms"] = (perf_counter() - began) * 1e3
            report |= self.strengths(runner, sent)
            if self.arguments.large:
                report |= self.undisturbed(runner)
        if self.arguments.large:
            report |= self.second_use()
        return report

    def strengths(self, runner: Any, sent: list[int]) -> dict[str, Any]:
        from mesh_core.loras.lora import Applied

        lora = self.lora(self.arguments.rank, 1)
        plain = runner(self.inputs)
        first = self.clock(lambda: runner.set_loras([Applied(lora, 1.0)]))
        changed, times, crossed = runner(self.inputs), [], []
        for i in range(self.arguments.changes):
            before = sent[0]
            times.append(self.clock(lambda i=i: runner.set_loras([Applied(lora, 0.5 + i / 100)])))
            crossed.append(sent[0] - before)
        off = self.clock(lambda: runner.set_loras([]))
        restored = runner(self.inputs)
        return {
            "rank": self.arguments.rank,
            "lora_mb": lora.nbytes / 1e6,
            "layers": len(self.layers),
            "first_use_ms": first,
            "change_ms": median(times),
            "change_worst_ms": max(times),
            "change_bytes": max(crossed),
            "off_ms": off,
            "lora_acts": not bool((plain == changed).all()),
            "base_restored": bool((plain == restored).all()),
        }

    def large(self, seed: int) -> Any:
        per_rank = sum(rows + columns for rows, columns in self.layers.values()) * self.dtype.itemsize
        return self.lora(max(int(self.arguments.large * 1e6 / per_rank), 1), seed)

    def undisturbed(self, runner: Any) -> dict[str, Any]:
        """Steps of one session while another host sends a large LoRA."""
        from mesh_core.host.loras import send
        from mesh_core.host.remote import Remote
        from mesh_core.model import fingerprint
        from mesh_core.system.config import Settings
        from mesh_core.transport.base import Address

        lora, structure = self.large(2), fingerprint.structure(self.checkpoint.spec)
        remote, seconds = Remote(Address(self.address), self.plugins, Settings()), []
        remote.connect()
        lora.id  # noqa: B018  # hashing belongs to neither

        def transfer() -> None:
            began = perf_counter()
            send(remote, lora, structure, Settings(), None)
            seconds.append(perf_counter() - began)

        _, alone = timed(lambda: runner(self.inputs), 10, self.device)
        sender, times = threading.Thread(target=transfer), []
        sender.start()
        while sender.is_alive():
            times.append(self.clock(lambda: runner(self.inputs)))
        sender.join()
        remote.close()
        return {
            "step_ms": alone,
            "step_during_transfer_ms": median(times),
            "step_during_transfer_worst_ms": max(times),
            "steps_during_transfer": len(times),
            "transfer_mb": lora.nbytes / 1e6,
            "transfer_s": seconds[0],
        }

    def second_use(self) -> dict[str, Any]:
        from mesh_core.loras.lora import Applied

        lora, found = self.large(3), {}
        for name in ("first", "second"):
            with self.session() as (runner, sent):
                before = sent[0]
                found[f"{name}_use_s"] = self.clock(lambda: runner.set_loras([Applied(lora, 0.5)])) / 1e3
                found[f"{name}_use_bytes"] = sent[0] - before
        return {"large_mb": lora.nbytes / 1e6, **found}

    def clock(self, work: Any) -> float:
        from mesh_core.system.device import synchronise

        began = perf_counter()
        work()
        synchronise(self.device)
        return (perf_counter() - began) * 1e3


def timed(step: Any, steps: int, device: Any) -> tuple[Any, float]:
    """The last result, and the median milliseconds of a step after two warm-up steps."""
    import torch

    from mesh_core.system.device import synchronise

    times = []
    with torch.no_grad():
        for _ in range(steps + 2):
            synchronise(device)
            began = perf_counter()
            result = step()
            synchronise(device)
            times.append((perf_counter() - began) * 1e3)
    return result, sorted(times[2:])[len(times[2:]) // 2]


def markdown(r: dict[str, Any]) -> str:
    rows = [
        ("loading the span from disk", f"{r['load_ms']:.0f} ms"),
        (f"first use of a LoRA (rank {r['rank']}, {r['lora_mb']:.1f} MB)", f"{r['first_use_ms']:.0f} ms"),
        ("a changed strength, median", f"{r['change_ms']:.1f} ms"),
        ("a changed strength, worst", f"{r['change_worst_ms']:.1f} ms"),
        ("a changed strength, sent", f"{r['change_bytes']} bytes"),
        ("back to no LoRA", f"{r['off_ms']:.1f} ms"),
        ("the base is what it was, bit for bit", "yes" if r["base_restored"] else "NO"),
    ]
    if "large_mb" in r:
        rows += [
            (f"first use of a LoRA of {r['large_mb']:.0f} MB", f"{r['first_use_bytes'] / 1e6:.1f} MB sent"),
            ("its use by the next session", f"{r['second_use_bytes']} bytes sent"),
            ("a step of another session, alone", f"{r['step_ms']:.1f} ms"),
            (
                f"the same while {r['transfer_mb']:.0f} MB arrive in {r['transfer_s']:.1f} s",
                f"{r['step_during_transfer_ms']:.1f} ms (worst of {r['steps_during_transfer']}: "
                f"{r['step_during_transfer_worst_ms']:.1f} ms)",
            ),
        ]
    head = f"{r['geometry']}, {r['layers']} layers with a LoRA, {r['device']}, torch {r['torch']}; loopback with CURVE"
    if "worker_memory" in r:
        head += f"; worker with {r['worker_memory']}"
    return "\n".join([head, "", "| what | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


if __name__ == "__main__":
    main()
