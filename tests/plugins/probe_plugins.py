"""Run as a program in an environment with test plugins: prints, as JSON, what the core makes of them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from mesh_core.builtin import load_plugins
from mesh_core.crossing.stats import StepStats
from mesh_core.errors import PluginError
from mesh_core.model.plan import WorkerInfo
from mesh_core.plugins.registry import Plugins


def asked(plugins: Plugins, kind: str, name: str) -> str:
    """The class of what the user gets for a name, or the error in full."""
    try:
        return type(getattr(plugins, kind)(name)).__name__
    except PluginError as error:
        return f"{type(error).__name__}: {error}"


def call_hooks(plugins: Plugins) -> dict[str, Any]:
    # Imported here: this program tells what loading the plugins imports.
    import torch

    from mesh_core.crossing.cost import Crossing, End
    from mesh_core.crossing.speed_book import SpeedBook

    here = SpeedBook(torch.device("cpu"))
    hook, two = plugins.hook, [WorkerInfo("host"), WorkerInfo("attic")]
    hook.mesh_step_started(step=3)
    hook.mesh_step_finished(step=3, stats=StepStats(3, total_ms=7.5))
    hook.mesh_step_failed(step=4, error=ValueError("too hot"))
    choice = {
        "role": "hidden",
        "link": None,
        "crossing": Crossing(1 << 20, torch.bfloat16, End(book=here), End(), here),
        "codecs": list(plugins.codecs().values()),
        "peer": {"raw": {}},
    }
    return {
        "split": [str(hop.span) for hop in hook.mesh_propose_split(model=None, workers=two, links=[None])],
        "codec": hook.mesh_choose_codec(quality="fast", **choice).codec,
        "codec_by_default": hook.mesh_choose_codec(quality="lossless", **choice).codec,
        "lora": hook.mesh_place_lora(lora="ink.safetensors", stage=None, worker=two[1]),
    }


def main() -> None:
    plugins = load_plugins()
    before = sorted(name for name in sys.modules if name.startswith("mesh_test_") or name == "torch")
    lookups = {question: asked(plugins, *question.split(":")) for question in sys.argv[1:]}
    found: dict[str, Any] = {
        "imported_by_load": before,
        "lookups": lookups,
        "reports": {f"{r.name} of {r.distribution}": asdict(r) for r in plugins.report()},
        "versions": plugins.versions(),
        "families": plugins.adapter_versions(),
    }
    if "wavelets" in plugins.codecs():
        found["hooks"] = call_hooks(plugins)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
