"""What the ComfyUI node adds to a step, next to the script host, on tiny-klein: ``python -m benchmarks.comfy_node``.

Everything is remote (cut 0), so what a step takes besides the worker's computing, the codec and the wire is the host's
own work: in ComfyUI its patching of latents, the node and the session; in the script the adapter and the session.
Both use the same worker, alternately, in one run. Prints medians and ComfyUI's own measure of how long the pack took to
import, which it rounds to tenths of a second. ``--out FOLDER`` keeps them. Needs what ``tests/comfy`` needs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.comfy import conftest, graphs  # noqa: E402
from tests.comfy.install import installed  # noqa: E402
from tests.comfy.server import Server, comfy_server  # noqa: E402
from tests.support.splitting import split  # noqa: E402
from tests.support.workers import mesh_home, process_worker  # noqa: E402

STEPS = 20
WARM_UP = 3
NODE_TARGET_MS, IMPORT_TARGET_S = 5.0, 0.3
TOKENS = {"text": 512, "image": 64}


def in_comfy(server: Server, address: str, seed: int) -> float:
    """Milliseconds of the host's own work in one step."""
    server.run(graphs.with_split(graphs.text_to_latent(steps=1, seed=seed), address, 0))
    step = server.state("split")["step"]
    return float(step["local_ms"] + step["other_ms"])


def in_script(runner: object, seed: int) -> float:
    """The same for one forward pass of the script host."""
    torch.manual_seed(seed)
    ids = {name: torch.zeros(count, 4) for name, count in TOKENS.items()}
    ids["text"][:, 3], ids["image"][:, 1] = torch.arange(512), torch.arange(64)
    runner(  # type: ignore[operator]
        {
            "hidden_states": torch.randn(1, 64, 128),
            "encoder_hidden_states": torch.zeros(1, 512, 192),
            "timestep": torch.ones(1),
            "img_ids": ids["image"],
            "txt_ids": ids["text"],
            "guidance": None,
        }
    )
    step = runner.stats.steps[-1]  # type: ignore[attr-defined]
    return float(step.local_ms + step.overhead_ms)


def main() -> None:
    from mesh_core.bench.report import save
    from mesh_core.builtin import load_plugins

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--label", default="", help="the hardware's name in the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, mesh_home(Path(folder) / "home") as home:
        base = Path(folder) / "comfyui"
        models = base / "models" / "diffusion_models"
        conftest.single_file(conftest.EXAMPLE / "model", models / "tiny-klein.safetensors")
        with (
            process_worker(models, home=home) as worker,
            comfy_server(installed(), base, home, ROOT, conftest.EXAMPLE / "comfy_nodes") as server,
            torch.inference_mode(),
            split(models / "tiny-klein.safetensors", ":0", [worker.address], load_plugins()) as runner,
        ):
            pairs = [(in_comfy(server, worker.address, i), in_script(runner, i)) for i in range(STEPS)]
        node, script = (median(column) for column in zip(*pairs[WARM_UP:], strict=True))
        took = next(line.strip() for line in server.log if line.endswith(f"custom_nodes/{ROOT.name}"))
    seconds = float(took.split()[0])
    text = "\n".join(
        [
            f"host's own work per step, median of {STEPS - WARM_UP}",
            f"  script   {script:5.2f} ms",
            f"  ComfyUI  {node:5.2f} ms",
            f"ComfyUI's import of the pack: {seconds:.1f} s",
            "",
            _verdict("the node adds to a step", node - script, NODE_TARGET_MS, "ms"),
            _verdict("the pack adds to ComfyUI's start", seconds, IMPORT_TARGET_S, "s"),
        ]
    )
    print(text)
    if options.out:
        data = {"script_ms": script, "comfyui_ms": node, "import_s": seconds, "pairs_ms": pairs}
        save(options.out, "comfy-node", options.label, data, text)


def _verdict(name: str, found: float, target: float, unit: str) -> str:
    return f"{'met   ' if found <= target else 'MISSED'}  {name}: {found:.2f} {unit}, target <= {target:g} {unit}"


if __name__ == "__main__":
    main()
