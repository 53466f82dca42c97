"""A worker that dies, a user who stops, a key that is wrong, weights that differ: the run goes on, or says why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
import torch
from safetensors.torch import load_file, save_file

from mesh_core.transport.curve import new_key_pair
from mesh_core.transport.keys import KeyStore, KnownWorker
from tests.comfy import graphs
from tests.comfy.server import RunFailed, Server
from tests.support.workers import ProcessWorker, process_worker, wait_until

STEPS = 6


@pytest.fixture(scope="module")
def fragile(base: Path, home: Path) -> Iterator[ProcessWorker]:
    """A worker that tests may kill."""
    with process_worker(base / "models" / "diffusion_models", home=home, name="fragile") as worker:
        yield worker


def _at_step(server: Server, node: str, step: int) -> None:
    wait_until(lambda: server.state(node).get("steps", 0) >= step, 60, f"step {step}")


def test_a_worker_that_is_killed_and_started_again(server: Server, fragile: ProcessWorker) -> None:
    graph = graphs.text_to_latent(steps=STEPS, seed=11)
    whole = server.latent(graph)
    prompt = server.queue(graphs.with_split(graph, fragile.address, 5, "killed"))
    _at_step(server, "killed", 2)
    fragile.kill()
    wait_until(lambda: server.state("killed")["state"] == "lost", 30, "the loss on the node")
    fragile.restart()
    split = server.saved(server.wait(prompt))
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-5)
    assert server.state("killed")["reconnects"] >= 1


def test_a_worker_that_stays_away(server: Server, fragile: ProcessWorker) -> None:
    graph = graphs.text_to_latent(steps=STEPS, seed=12)
    prompt = server.queue(graphs.with_split(graph, fragile.address, 5, "away", on_failure="stop"))
    _at_step(server, "away", 2)
    fragile.kill()
    with pytest.raises(RunFailed) as failed:
        server.wait(prompt)
    assert failed.value.kind.startswith("mesh_core.errors.") and "mesh serve" in failed.value.text
    assert server.state("away")["state"] == "failed"
    fragile.restart()
    torch.testing.assert_close(
        server.latent(graphs.with_split(graph, fragile.address, 5, "away", on_failure="stop")),
        server.latent(graph),
        rtol=0,
        atol=1e-5,
    )


def test_run_here_instead(server: Server, fragile: ProcessWorker) -> None:
    graph = graphs.text_to_latent(steps=STEPS, seed=13)
    whole = server.latent(graph)
    prompt = server.queue(graphs.with_split(graph, fragile.address, 5, "here", on_failure="run here"))
    _at_step(server, "here", 2)
    fragile.kill()
    torch.testing.assert_close(server.saved(server.wait(prompt)), whole, rtol=0, atol=1e-5)
    assert server.state("here")["state"] == "local"
    fragile.restart()


def test_stop_ends_the_remote_work_too(server: Server, fragile: ProcessWorker) -> None:
    graph = graphs.with_split(graphs.text_to_latent(steps=STEPS, seed=14), fragile.address, 1, "stop")
    prompt = server.queue(graph)
    _at_step(server, "stop", 1)
    fragile.pause()
    began = monotonic()
    server.interrupt()
    with pytest.raises(RunFailed) as stopped:
        server.wait(prompt)
    assert stopped.value.kind == "execution_interrupted"
    # The paused worker never answered, so it was not the end of a step that ended the run.
    assert monotonic() - began < 3.5
    fragile.resume()
    server.latent(graphs.with_split(graphs.text_to_latent(seed=15), fragile.address, 1, "stop"))


def test_a_wrong_key(server: Server, home: Path, fragile: ProcessWorker) -> None:
    place = fragile.address.removeprefix("mesh://").partition("?")[0]
    keys = KeyStore(home / "config")
    keys.remember(KnownWorker(place, new_key_pair()[0], "impostor"))
    with pytest.raises(RunFailed) as failed:
        server.run(graphs.with_split(graphs.text_to_latent(), f"mesh://{place}", 4))
    keys.forget(place)
    assert "NotAuthorised" in failed.value.kind or "Unreachable" in failed.value.kind, failed.value


def test_another_checkpoint(server: Server, home: Path, base: Path, tmp_path: Path) -> None:
    other = load_file(base / "models" / "diffusion_models" / "tiny-klein.safetensors")
    other["img_in.weight"][0, 0] += 1
    save_file(other, tmp_path / "retrained.safetensors")
    with process_worker(tmp_path, home=home, name="other") as worker:
        with pytest.raises(RunFailed) as failed:
            server.run(graphs.with_split(graphs.text_to_latent(), worker.address, 4))
        assert "CheckpointMismatch" in failed.value.kind and "retrained.safetensors" in failed.value.text


def test_nobody_there(server: Server) -> None:
    with pytest.raises(RunFailed, match="mesh serve --port 9"):
        server.run(graphs.with_split(graphs.text_to_latent(), "mesh://127.0.0.1:9", 4, on_failure="stop"))


def test_no_worker_chosen(server: Server) -> None:
    with pytest.raises(RunFailed, match="No worker was chosen"):
        server.run(graphs.with_split(graphs.text_to_latent(), "", 4))
