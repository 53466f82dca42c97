"""What users do instead of a split: diffusers' group offloading with streams, in bfloat16, on one smaller card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.quantised.limited import CONTEXT, limit, reserved
from benchmarks.quantised.streaming import pin
from benchmarks.split_on_gpu import forward_of, generate, random_inputs, random_model

WAYS: Mapping[str, dict[str, Any]] = {
    "by block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "by layer": {"offload_type": "leaf_level"},
}


def measured(
    geometry: str, size: int, steps: int, budget: int, device: torch.device, others: Mapping[str, Any]
) -> dict[str, Any]:
    """The step of the whole model on the device, and offloaded on a card of ``budget`` bytes.

    Its weights lie in one stretch of pinned memory: diffusers pins copies of all of them else, beside the weights.
    """
    model = random_model(geometry, device, **others)
    inputs = random_inputs(model, size, device)
    expected, resident_ms = generate(forward_of(model), inputs, steps, device)
    print(f"resident {resident_ms:.1f} ms", flush=True)
    rows = [{"way": "resident", "step_ms": resident_ms, "peak_GB": (reserved()["peak"] + CONTEXT) / 1e9, "exact": True}]
    views = to_host(model, device)
    limit(budget)
    for way, arguments in WAYS.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model.enable_group_offload(
            onload_device=device, offload_device=torch.device("cpu"), use_stream=device.type == "cuda",
            record_stream=device.type == "cuda", **arguments,
        )  # fmt: skip
        result, ms = generate(forward_of(model), inputs, steps, device)
        print(f"{way} {ms:.1f} ms", flush=True)
        exact = all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
        rows.append({"way": way, "step_ms": ms, "peak_GB": (reserved()["peak"] + CONTEXT) / 1e9, "exact": exact})
        _remove(model)
        for parameter, view in views:
            parameter.data = view
    return {"parameters": sum(p.numel() for p in model.parameters()), "rows": rows}


def to_host(model: torch.nn.Module, device: torch.device) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Move all weights into one stretch of memory, pinned if the device is a GPU; where each of them lies."""
    room, at = torch.empty(sum(p.nbytes for p in model.parameters()), dtype=torch.uint8), 0
    if device.type == "cuda":
        pin(room)
    views = []
    for parameter in model.parameters():
        view = room[at : at + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        at += parameter.nbytes
        parameter.data = view.copy_(parameter.data)
        views.append((parameter, view))
    for buffer in model.buffers():
        buffer.data = buffer.data.cpu()
    return views


def _remove(model: torch.nn.Module) -> None:
    """Take the hooks of group offloading off."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            for name in reversed(list(registry.hooks)):
                registry.remove_hook(name, recurse=False)
            del module._diffusers_hook
