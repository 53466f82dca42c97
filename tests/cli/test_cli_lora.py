"""``mesh lora`` and the LoRA options of ``mesh serve`` and ``mesh generate``, against a real worker process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageChops

from mesh_core.cli import cli
from tests.support import loras, pipelines
from tests.support.workers import ProcessWorker, mesh_home, process_worker


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mesh_home(tmp_path_factory.mktemp("home")) as home:
        yield home


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("models")
    pipelines.save(folder / "klein", dtype=torch.float32)
    shapes = {"x_embedder": (64, 16), "transformer_blocks.1.attn.to_q": (64, 64)}
    loras.save(folder / "mine" / "ink.safetensors", loras.peft(shapes))
    extra = {"lora_te_mlp.lora_up.weight": torch.ones(2, 2)}
    loras.save(folder / "theirs" / "turbo.safetensors", loras.peft(shapes, seed=9) | extra, trigger_words="fast")
    return folder


@pytest.fixture(scope="module")
def worker(home: Path, folder: Path) -> Iterator[ProcessWorker]:
    with process_worker(folder / "klein", "--device", "cpu", "--loras", str(folder / "theirs")) as worker:
        yield worker


def mesh(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def test_push_list_and_rm(worker: ProcessWorker, folder: Path) -> None:
    ink = str(folder / "mine" / "ink.safetensors")
    pushed = mesh("lora", "push", worker.address, ink, "--model", str(folder / "klein"))
    assert pushed.exit_code == 0, pushed.output
    assert "B sent" in pushed.output
    assert "was there" in mesh("lora", "push", worker.address, ink, "--model", str(folder / "klein")).output
    listed = json.loads(mesh("lora", "list", worker.address, "--json").stdout)
    assert {(x["name"], x["received"]) for x in listed} == {("ink", True), ("turbo.safetensors", False)}
    assert "fast" in mesh("lora", "list", worker.address).output
    assert mesh("lora", "rm", worker.address, "turbo").exit_code == 2, "what is the user's own stays"
    assert "removed ink" in mesh("lora", "rm", worker.address, "ink").output
    assert mesh("lora", "list", worker.address).output.count("safetensors") == 1


def test_inspect(folder: Path) -> None:
    file = str(folder / "theirs" / "turbo.safetensors")
    assert "trigger: fast" in mesh("lora", "inspect", file).output
    facts = json.loads(mesh("lora", "inspect", file, "--model", str(folder / "klein"), "--json").stdout)
    assert facts["algorithms"] == {"lora": 2} and facts["unmatched"] == ["lora_te_mlp.lora_up.weight"]
    assert "1 keys match nothing" in mesh("lora", "inspect", file, "--model", str(folder / "klein")).output
    done = mesh("lora", "inspect", str(folder / "nothing.safetensors"))
    assert done.exit_code == 2 and "try:" in done.output


EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-klein"
NIGHT = EXAMPLE / "loras" / "night.safetensors"


def picture(out: Path, *arguments: str) -> Image.Image:
    fixed = ["--steps", "1", "--width", "64", "--height", "64", "--device", "cpu", "-o", str(out)]
    done = mesh("generate", str(EXAMPLE / "model"), "crying face", *fixed, *arguments)
    assert done.exit_code == 0, done.output
    return Image.open(out).convert("RGB")


def test_generate_with_a_file_with_what_the_worker_has_and_with_its_preset(home: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--loras", str(EXAMPLE / "loras"))
    with process_worker(EXAMPLE / "model", *options) as worker:
        remote = ("--local", ":0", "--worker", worker.address)
        named = picture(tmp_path / "named.png", *remote, "--lora", "night.safetensors=0.8")
    with process_worker(EXAMPLE / "model", "--device", "cpu", "--lora", f"{NIGHT}=0.8") as worker:
        preset = picture(tmp_path / "preset.png", "--local", ":0", "--worker", worker.address)
    whole = picture(tmp_path / "whole.png", "--local", ":", "--lora", f"{NIGHT}=0.8")
    plain = picture(tmp_path / "plain.png", "--local", ":")
    assert ImageChops.difference(whole, plain).getbbox(), "the LoRA changes the picture"
    assert named.tobytes() == preset.tobytes() == whole.tobytes()


def test_serve_refuses_folders_that_do_not_exist(folder: Path) -> None:
    for option in ("--loras", "--lora"):
        done = mesh("serve", str(folder / "klein"), option, str(folder / "nowhere"))
        assert done.exit_code == 2 and "try:" in done.output
