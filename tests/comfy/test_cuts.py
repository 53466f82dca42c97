"""Mesh Split at every cut gives the latents that ComfyUI gives without it."""

from __future__ import annotations

import pytest
import torch

from tests.comfy import graphs
from tests.comfy.server import Server
from tests.support.workers import ProcessWorker

BLOCKS = 12
NEAR = 1e-5
"""ComfyUI's blocks and diffusers' differ by about 1e-6 in float32."""


@pytest.mark.parametrize("cut", range(BLOCKS + 1))
def test_every_cut(server: Server, worker: ProcessWorker, cut: int) -> None:
    whole = server.latent(graphs.klein())
    split = server.latent(graphs.klein(mesh=graphs.split(worker.address, cut)))
    again = server.latent(graphs.klein(mesh=graphs.split(worker.address, cut)))
    torch.testing.assert_close(split, whole, rtol=0, atol=NEAR)
    assert torch.equal(split, again)
