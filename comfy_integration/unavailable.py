"""Nodes that say why they cannot run, in the form that every ComfyUI knows. Imports nothing of ComfyUI or the mesh."""

from __future__ import annotations

from typing import Any

from .texts import CATEGORY, TITLES


def mappings(message: str) -> tuple[dict[str, type], dict[str, str]]:
    """Node classes by name, and their titles."""
    return {name: _unavailable(name, message) for name in TITLES}, {n: f"{t} (unavailable)" for n, t in TITLES.items()}


def _unavailable(name: str, message: str) -> type:
    def fail(self: Any, **inputs: Any) -> None:
        raise RuntimeError(message)

    attributes = {
        "INPUT_TYPES": classmethod(lambda cls: {"required": {}, "optional": {"model": ("MODEL",)}}),
        "VALIDATE_INPUTS": classmethod(lambda cls, **inputs: message),
        "RETURN_TYPES": ("MODEL",),
        "FUNCTION": "fail",
        "CATEGORY": CATEGORY,
        "DESCRIPTION": message,
        "fail": fail,
    }
    return type(name, (), attributes)
