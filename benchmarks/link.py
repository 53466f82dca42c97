"""Whole split steps over a link of a chosen rate: uncoded, at each quality, and with the codec chosen by itself.

    python -m benchmarks.link --rate 1gbit --rate 100mbit --model examples/tiny-klein/model

Host and worker are processes of their own at the two ends of a link of that rate, on this machine: network namespaces
and a token bucket where the system is Linux and the user root, else a relay in user space. The synthetic model has the
state of a 9B model at 1024x1024 pixels and blocks that do nothing but copy. Takes minutes; Ctrl-C ends it with what was
measured so far.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file

from benchmarks import ROOT
from benchmarks.networks import Network, shaped
from mesh_codec.qualities import lossy, names
from mesh_core.bench.processes import Child, plugins
from mesh_core.bench.report import save
from mesh_core.bench.through import ThroughModel
from mesh_core.system.tables import aligned
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.memory_link import SWITCH

RATES: Mapping[str, float] = {"100mbit": 12.5e6, "1gbit": 125e6, "2.5gbit": 312.5e6, "10gbit": 1250e6}
"""Bytes per second by the names that people know."""

LARGE = (1, 4608, 4096)
"""Of the synthetic state: a picture of 1024x1024 with 512 text tokens in a 9B model, 37.7 MB in bfloat16."""

SMALL = (1, 512, 2048)

LOSSY = "entropy"


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        model: a pipeline's folder; None for the synthetic geometry.
        local: the host's span of it.
        shape: of the synthetic state.
        steps: that count, of each row.
        size: pixels of the pipeline's pictures.
    """

    name: str
    steps: int
    model: Path | None = None
    local: str = ":1"
    shape: Sequence[int] = LARGE
    size: int = 128
    prompt: str = "crying face"


def rows(codecs: Sequence[str]) -> list[dict[str, Any]]:
    """What is compared: codecs by name at the quality that they give, then each quality with the codec left open."""
    fixed = [("raw", "lossless", "raw"), *(("lossless", "lossless", c) for c in ("lossless",) if c in codecs)]
    coded = [(quality, quality, LOSSY) for quality in lossy()]
    chosen = [(f"auto {quality}", quality, None) for quality in names()]
    return [{"name": n, "quality": q, "codec": c} for n, q, c in (*fixed, *coded, *chosen)]


def measure(rate: str, workload: Workload, *, relay: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of one workload at one rate, as they come.

    Raises:
        TransportError: a process did not start, or the system refused the network.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True)))
        network = stack.enter_context(shaped(RATES[rate], relay=relay))
        host = stack.enter_context(_host(folder, network, workload, stack))
        while "done" not in (row := host.hear()):
            yield {"rate": rate, "workload": workload.name, "network": network.kind, **row}


def _host(folder: Path, network: Network, workload: Workload, stack: ExitStack) -> Child:
    home, model = folder / "home", workload.model
    if model is None:
        model = folder / "through.safetensors"
        save_file(ThroughModel(1, head=True).state_dict(), model)
    store = KeyStore(home / "config")
    store.authorise(store.identity().client.public, "benchmark")
    installed = workload.model is not None
    told = {"model": str(model.absolute()), "installed": installed, "insecure": False}
    serving = {**told, "name": "worker", "bind": network.bind, "memory": 4 << 30, "survey": True}
    worker = stack.enter_context(Child("mesh_core.bench.worker", serving, home, network.worker_prefix))
    told |= {
        "address": network.reach(worker.hear()["address"]),
        "rows": rows(list(plugins().codecs())),
        "steps": workload.steps,
        "shape": list(workload.shape),
        "local": workload.local,
        "size": workload.size,
        "prompt": workload.prompt,
    }
    return Child("benchmarks.link_host", told, home, network.host_prefix, ROOT)


_COLUMNS = (
    ("rate", "rate", "{}"),
    ("setting", "name", "{}"),
    ("codec", "used", "{}"),
    ("step ms", "step_ms", "{:.1f}"),
    ("wire ms", "wire_ms", "{:.1f}"),
    ("codec ms", "codec_ms", "{:.1f}"),
    ("compute ms", "compute_ms", "{:.1f}"),
    ("MB there", "there_mb", "{:.2f}"),
    ("MB back", "back_mb", "{:.2f}"),
    ("of raw", "of_raw", "{:.2f}"),
    ("against raw", "against_raw", "{:.2f}x"),
)

LEGEND = """\
Medians of a step as the host program sees it, without the host's own blocks; the first two steps do not count.
MB there: the state from host to worker. MB back: the prediction. against raw: raw's step over this one's, same rate
and run. auto: the codec was left open. Encrypted with CURVE, as by default."""


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Plain text, one block per workload, and the reasons that the choices gave."""
    parts = []
    for workload in dict.fromkeys(row["workload"] for row in found):
        mine = with_ratios([row for row in found if row["workload"] == workload])
        cells = [[head for head, _, _ in _COLUMNS]]
        cells += [[form.format(row[key]) for _, key, form in _COLUMNS] for row in mine if "failed" not in row]
        failed = [f"{row['rate']} {row['name']} failed: {row['failed']}" for row in mine if "failed" in row]
        reasons = [f"{row['rate']} {row['name']}: {row['reason']}" for row in mine if row.get("codec", 0) is None]
        kinds = ", ".join(dict.fromkeys(row["network"] for row in mine))
        parts.append("\n".join([f"{workload} ({kinds})", *aligned(cells), *failed, "", *reasons]))
    return "\n\n".join([*parts, LEGEND])


def with_ratios(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``found`` with how much faster each row was than raw at the same rate."""
    raw = {row["rate"]: row["step_ms"] for row in found if row["name"] == "raw" and "failed" not in row}
    return [
        {**row, "against_raw": raw.get(row["rate"], float("nan")) / row["step_ms"]}
        if "failed" not in row
        else dict(row)
        for row in found
    ]


def main() -> None:
    """Measure, and print or save what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", action="append", choices=RATES, help="of the link, each way; repeat [1gbit]")
    parser.add_argument("--model", type=Path, default=None, help="a pipeline's folder, to run too")
    parser.add_argument("--local", default=":4", help="the host's blocks of that model")
    parser.add_argument("--steps", type=int, default=5, help="measured per row")
    parser.add_argument("--small", action="store_true", help="a synthetic state of 2 MB instead of 38 MB")
    parser.add_argument("--relay", action="store_true", help="shape the link in user space even where the system could")
    parser.add_argument("--label", default="", help="of the machine")
    parser.add_argument("--save", type=Path, default=None, help="folder for the results")
    options = parser.parse_args()
    # Both ends are on this machine: in memory, states would not cross the link.
    os.environ[SWITCH] = "0"
    shape = SMALL if options.small else LARGE
    workloads = [Workload(f"synthetic state {list(shape)}, bfloat16", options.steps, shape=shape)]
    if (model := options.model) is not None:
        name = f"{model.parent.name}/{model.name}, local {options.local}"
        workloads.append(Workload(name, options.steps, model, options.local))
    found: list[dict[str, Any]] = []
    with suppress(KeyboardInterrupt):
        # What is there by then is still worth a table.
        for workload, rate in product(workloads, options.rate or ("1gbit",)):
            for row in measure(rate, workload, relay=options.relay):
                print(f"{rate} {workload.name}: {row['name']} ...", file=sys.stderr, flush=True)
                found.append(row)
    text, data = table(found), {"results": with_ratios(found)}
    print(text)
    if options.save:
        for path in save(options.save, "link", options.label, data, text):
            print(f"saved {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
