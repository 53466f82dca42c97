"""Nodes for tests: texts and sounds as LTX-2's own nodes make them, without a text encoder or a VAE."""

from __future__ import annotations

from typing import Any

import torch


def _number(default: int) -> tuple[str, dict[str, Any]]:
    return ("INT", {"default": default, "max": 1 << 20})


class TestText:
    """Random embeddings; ``raw``: as a text encoder gives them, before the model's own connectors."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        numbers = {"seed": _number(0), "tokens": _number(8), "width": _number(8)}
        return {"required": {**numbers, "raw": ("BOOLEAN", {"default": True})}}

    def make(self, seed: int, tokens: int, width: int, raw: bool) -> tuple[Any]:
        text = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))
        return ([[text, {"unprocessed_ltxav_embeds": True} if raw else {}]],)


class TestSound:
    """An empty audio latent, [batch, 8, frames, 16]."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"frames": _number(5), "batch_size": _number(1)}}

    def make(self, frames: int, batch_size: int) -> tuple[Any]:
        return ({"samples": torch.zeros(batch_size, 8, frames, 16), "type": "audio"},)


class TestVideoMask:
    """The first latent frame is given: its noise mask is 0."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",)}}

    def make(self, samples: Any) -> tuple[Any]:
        video = torch.randn(samples["samples"].shape, generator=torch.Generator().manual_seed(5))
        mask = torch.ones(len(video), 1, video.shape[2], 1, 1)
        mask[:, :, 0] = 0
        return ({**samples, "samples": video, "noise_mask": mask},)


NODES = (TestText, TestSound, TestVideoMask)
