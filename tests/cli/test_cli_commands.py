"""The commands that do the work, as a user runs them: serve, inspect, generate, doctor, bench."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageChops

from benchmarks.quantise.gguf import write_gguf
from mesh_codec import EntropyCodec
from mesh_codec.qualities import names
from mesh_core.builtin import installed_plugins
from mesh_core.cli import FAILED, cli
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import recognise
from mesh_core.system.remembered import Remembered
from tests.adapters import tiny
from tests.support.workers import ProcessWorker, mesh_home, process_worker

TINY_KLEIN = Path(__file__).parents[2] / "examples" / "tiny-klein" / "model"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mesh_home(tmp_path_factory.mktemp("commands")) as folder:
        yield folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline and a single file."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(TINY_KLEIN, folder / "tiny-klein")
    tiny.save_single_file(tiny.transformer(guidance=True), folder / "dev.safetensors")
    return folder


@pytest.fixture(scope="module")
def worker(models: Path, home: Path) -> Iterator[ProcessWorker]:
    with process_worker(models, "--device", "cpu", name="attic") as running:
        yield running


def in_gguf(path: Path) -> Path:
    """A Klein in blocks of 8 bits, under the names that its authors give."""
    return write_gguf(path, tiny.to_original(tiny.transformer(guidance=False)), "Q8_0")


def mesh(*arguments: object) -> Result:
    # A command is a process of its own; here others may have cached the plugins of another environment.
    installed_plugins.cache_clear()
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def checks(*arguments: object) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
    """Exit code of ``mesh doctor``, and its checks by subject and name."""
    result = mesh("doctor", "--json", *arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    report = json.loads(result.stdout)
    assert report["failed"] == sum(c["status"] == "FAIL" for c in report["checks"])
    return result.exit_code, {(c["subject"], c["name"]): c for c in report["checks"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_serve_lists_what_it_serves(worker: ProcessWorker) -> None:
    served = "\n".join(worker.log)
    assert "tiny-klein: klein" in served
    assert "dev.safetensors: flux2" in served


def test_serve_says_what_it_left_out_and_why(models: Path, tmp_path: Path) -> None:
    weights = TINY_KLEIN / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, tmp_path / "vae.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:100_000])
    (tmp_path / "flux.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    (tmp_path / "old.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    shutil.copy(TINY_KLEIN.parent / "loras" / "night.safetensors", tmp_path)
    (tmp_path / "notes.txt").write_text("nobody takes this for a model")
    for i in range(6):
        (tmp_path / f"z{i}.safetensors").write_bytes(bytes(4))
    shutil.copy(models / "dev.safetensors", tmp_path)
    in_gguf(tmp_path / "klein-Q8_0.gguf")
    with process_worker(tmp_path, "--device", "cpu") as worker:
        said = list(worker.log)
    left_out = [line for line in said if "not served: " in line]
    reasons = {name: line for line in left_out for name in os.listdir(tmp_path) if name in line}
    expected = {
        "cut.safetensors": "truncated",
        "flux.gguf": "GGUF",
        "lfs.safetensors": "Git LFS",
        "night.safetensors": "is a LoRA: name it, or its folder, with --loras",
        "old.ckpt": "not a safetensors file",
        "vae.safetensors": "No installed adapter",
    }
    for name, why in expected.items():
        assert why in reasons[name]
    assert len(reasons) == 10
    assert any("and 2 more files that are not served" in line for line in said)
    assert "notes.txt" not in "".join(said) and any("dev.safetensors: flux2" in line for line in said)
    assert any("klein-Q8_0.gguf: klein" in line for line in said)


def test_serve_ends_when_asked(tmp_path: Path) -> None:
    with process_worker(tmp_path, "--device", "cpu") as idle:
        idle.process.send_signal(signal.SIGTERM)
        # On Windows the signal ends a process at once, with this code.
        assert idle.process.wait(20) == (1 if sys.platform == "win32" else 0)


def test_serve_without_a_folder_says_what_to_name(tmp_path: Path) -> None:
    assert "mesh serve models/" in mesh("serve").stderr
    missing = mesh("serve", tmp_path / "gone")
    assert missing.exit_code == FAILED
    assert "does not exist" in missing.stderr


def test_serve_at_a_port_that_is_taken_says_so(models: Path, worker: ProcessWorker) -> None:
    port = worker.address.rpartition(":")[2]
    second = mesh("serve", models, "--port", port, "--device", "cpu")
    assert second.exit_code == FAILED
    assert f":{port}" in second.stderr and "--port" in second.stderr


@pytest.mark.parametrize("host", ["127.0.0.1:7801", "mesh://127.0.0.1"])
def test_serve_at_more_than_a_host_says_how_to_name_the_port(models: Path, host: str) -> None:
    result = mesh("serve", models, "--bind", host, "--device", "cpu")
    assert result.exit_code == FAILED and "--bind 0.0.0.0 --port 7777" in result.stderr


def test_inspect_describes_a_single_file(models: Path) -> None:
    facts = json.loads(mesh("inspect", models / "dev.safetensors", "--json").stdout)
    assert facts["family"] == "flux2"
    assert [b["kind"] for b in facts["blocks"]] == ["double"] * 2 + ["single"] * 3
    assert facts["bytes"] == sum(p.nbytes for p in tiny.transformer(guidance=True).parameters())


def test_inspect_describes_a_gguf_file(tmp_path: Path) -> None:
    file = in_gguf(tmp_path / "klein-Q8_0.gguf")
    facts = json.loads(mesh("inspect", file, "--json").stdout)
    assert facts["family"] == "klein" and facts["dtypes"] == ["F32", "gguf/Q8_0"]
    shown = mesh("inspect", file).stdout
    assert "gguf/Q8_0" in shown and "5 blocks" in shown


def test_inspect_suggests_a_cut_that_fits(models: Path) -> None:
    result = mesh("inspect", models / "tiny-klein", "--memory", "2.16GB", "--json")
    suggestion = json.loads(result.stdout)["suggestion"]
    assert suggestion["local_bytes"] + suggestion["reserve"] <= suggestion["memory"]
    assert suggestion["local_bytes"] > 0
    assert f"--local {suggestion['local']}" in mesh("inspect", models / "tiny-klein", "--memory", "2.16GB").stdout


def test_inspect_shows_small_sizes_and_how_to_have_a_cut_suggested(models: Path) -> None:
    shown = mesh("inspect", models / "dev.safetensors").stdout
    assert "0.00" not in shown and "KB each" in shown
    assert (
        "--memory" in shown and "--memory" not in mesh("inspect", models / "dev.safetensors", "--memory", "1GB").stdout
    )


def test_inspect_of_something_else_names_it(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a model")
    result = mesh("inspect", file)
    assert result.exit_code == FAILED
    assert str(file) in result.stderr


def test_generate_over_a_worker_gives_the_picture_of_one_machine(
    models: Path, worker: ProcessWorker, tmp_path: Path
) -> None:
    def generate(name: str, *options: object) -> Result:
        size = ("--width", 64, "--height", 64, "--steps", 2, "--seed", 5, "--device", "cpu")
        result = mesh("generate", models / "tiny-klein", "smiling face", *size, "-o", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        return result

    generate("whole.png", "--local", ":")
    short = f" {worker.address.removeprefix('mesh://')} = 2:"
    split = generate("split.png", "--local", ":2", "--worker", short, "--stats", tmp_path / "stats.json")
    with Image.open(tmp_path / "whole.png") as whole, Image.open(tmp_path / "split.png") as cut:
        assert ImageChops.difference(whole, cut).getbbox() is None
        assert whole.size == (64, 64)
    assert "attic" in split.stdout and "saved" in split.stdout
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert len(stats["steps"]) == 2
    assert all(hop["worker"] == "attic" for step in stats["steps"] for hop in step["hops"])


def test_generate_refuses_a_folder_that_is_not_there_before_it_loads_anything(models: Path, tmp_path: Path) -> None:
    result = mesh("generate", models / "tiny-klein", "face", "--local", ":", "-o", tmp_path / "gone" / "x.png")
    assert result.exit_code == FAILED
    assert "--output" in result.stderr
    for wrong in (["-o", tmp_path / "x.xyz"], ["-o", tmp_path], ["--stats", tmp_path / "gone" / "x.json"]):
        result = mesh("generate", models / "tiny-klein", "face", "--local", ":", *wrong)
        assert result.exit_code == FAILED and result.stderr.splitlines()[-1].startswith("try: "), wrong


def test_generate_from_a_single_file_says_what_it_needs_and_what_the_file_is_good_for(models: Path) -> None:
    result = mesh("generate", models / "dev.safetensors", "face")
    assert result.exit_code == FAILED
    assert "is a single file" in result.stderr and "folder of a whole pipeline" in result.stderr


def test_doctor_finds_nothing_wrong_with_this_machine_and_a_good_worker(models: Path, worker: ProcessWorker) -> None:
    code, found = checks(worker.address, "--model", models / "tiny-klein")
    assert code == 0, found
    assert {"python", "torch", "encryption", "settings", "keys", "cache", "adapters"} <= {n for s, n in found}
    here = {name: check for (subject, name), check in found.items() if subject == worker.address}
    assert {check["status"] for check in here.values()} == {"ok"}, here
    assert "attic" in here["handshake"]["detail"] and "encrypted" in here["handshake"]["detail"]
    assert "MB/s" in here["link"]["detail"] and "ms" in here["link"]["detail"]
    assert "klein" in here["adapters"]["detail"]
    assert "fingerprint" in here["weights"]["detail"]


def test_doctor_notices_other_weights(worker: ProcessWorker, tmp_path: Path) -> None:
    tiny.save_single_file(tiny.transformer(guidance=True, seed=1), tmp_path / "dev.safetensors")
    code, found = checks(worker.address, "--model", tmp_path / "dev.safetensors")
    weights = found[worker.address, "weights"]
    assert code == 1
    assert weights["status"] == "FAIL" and "other weights" in weights["detail"]
    assert weights["hint"]


def rotten(file: Path) -> None:
    """As if the disk had changed the content since it was hashed, and nothing else of the file."""
    header = read_header(file)
    structure = fingerprint.structure(recognise(header, installed_plugins()).spec)
    Remembered("fingerprints", header.stamps, structure).put("0" * 64)


def test_doctor_and_serve_notice_a_file_whose_content_changed_unseen(tmp_path: Path) -> None:
    model = tmp_path / "models" / "klein.safetensors"
    model.parent.mkdir()
    tiny.save_single_file(tiny.transformer(guidance=False, doubles=1, singles=1), model)

    def found() -> dict[str, Any]:
        _, report = checks("--model", model, "mesh://127.0.0.1:1")
        return report[("this machine", "weights")]

    assert "hashed for the first time" in found()["detail"]
    assert found()["status"] == "ok" and "as when it was hashed first" in found()["detail"]
    rotten(model)
    check = found()
    assert check["status"] == "FAIL" and "content changed" in check["detail"] and "copy it again" in check["hint"]
    rotten(model)
    with process_worker(model.parent, "--device", "cpu", "--verify", name="attic") as verified:
        assert "klein.safetensors: its content changed" in "\n".join(verified.log)


def test_doctor_says_which_part_of_the_way_fails(worker: ProcessWorker) -> None:
    closed = f"mesh://127.0.0.1:{free_port()}"
    port = worker.address.rpartition(":")[2]
    cases = {
        closed: ("port", "mesh serve"),
        "mesh://no-such-machine.invalid": ("name", "IP address"),
        "attic and cellar": ("address", "mesh://HOST"),
        f"mesh://127.0.0.1:{port}?insecure=yes": ("handshake", worker.address),
    }
    code, found = checks(*cases)
    assert code == 1
    for address, (name, advice) in cases.items():
        failures = {n: c for (subject, n), c in found.items() if subject == address and c["status"] == "FAIL"}
        assert failures.keys() == {name}, address
        assert advice in failures[name]["hint"], address


def test_doctor_checks_the_workers_that_were_joined(home: Path) -> None:
    from mesh_core.transport.keys import KeyStore, KnownWorker

    port, store = free_port(), KeyStore()
    store.remember(KnownWorker(f"127.0.0.1:{port}", store.identity().server.public, "gone"))
    try:
        code, found = checks()
    finally:
        store.forget("gone")
    assert code == 1
    assert found[f"mesh://127.0.0.1:{port}", "port"]["status"] == "FAIL"


def test_doctor_works_with_damaged_settings_and_keys(tmp_path: Path) -> None:
    with mesh_home(tmp_path):
        folder = tmp_path / "config"
        folder.mkdir()
        (folder / "config.toml").write_text("[worker]\nprot = 1\n")
        (folder / "known-workers.json").write_text("{")
        code, found = checks()
    assert code == 1
    failures = {name for (_, name), check in found.items() if check["status"] == "FAIL"}
    assert failures == {"settings", "keys"}
    assert "worker.prot" in found["this machine", "settings"]["detail"]


def test_doctor_reports_a_broken_plugin_and_goes_on(environment: Callable[..., dict[str, str]]) -> None:
    command = [sys.executable, "-m", "mesh_core.cli", "doctor"]
    done = subprocess.run(command, env=environment("broken"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAIL  plugin" in done.stdout and "mesh-test-broken" in done.stdout
    assert "codecs" in done.stdout
    assert "Traceback" not in done.stderr


def test_doctor_says_what_slows_a_codec_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntropyCodec, "remedies", lambda self: [("no kernels", "install them")])
    with mesh_home(tmp_path):
        code, found = checks()
    assert code == 0
    assert found["this machine", "codec entropy"]["status"] == "warn"
    assert found["this machine", "codec entropy"]["hint"] == "install them"


def test_doctor_says_that_the_cache_cannot_be_written(tmp_path: Path) -> None:
    with mesh_home(tmp_path):
        (tmp_path / "cache").write_text("a file where the folder belongs")
        code, found = checks()
    assert code == 1
    assert found["this machine", "cache"]["status"] == "FAIL"
    assert "MESH_HOME" in found["this machine", "cache"]["hint"]


def test_bench_step_measures_both_kinds_of_link_and_saves_the_results(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mesh_core.cli", "bench", "step", "--small", "--steps", "3", "--json"]
    options = ["--save", str(tmp_path / "results"), "--label", "A Test Machine"]
    done = subprocess.run([*command, *options], env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert [m["encrypted"] for m in printed["results"]] == [False, True]
    for measured in printed["results"]:
        assert measured["steps"] == 3
        assert 0 < measured["overhead_ms"] < measured["total_ms"]
    saved = json.loads((tmp_path / "results" / "step-a-test-machine.json").read_text())
    assert saved["hardware"] == "A Test Machine"
    assert saved["results"] == printed["results"]
    assert "overhead ms" in (tmp_path / "results" / "step-a-test-machine.md").read_text()


def test_bench_link_tells_what_each_quality_costs_over_the_link_to_a_worker(worker: ProcessWorker) -> None:
    result = mesh("bench", "link", worker.address, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "attic" in found["worker"] and found["encrypted"]
    assert min(found["there"]["bandwidth"], found["back"]["bandwidth"]) > 1e6
    qualities = {q["quality"]: q for q in found["qualities"]}
    assert list(qualities) == list(names())
    for q in qualities.values():
        assert q["total_ms"] == pytest.approx(q["encode_ms"] + q["wire_ms"] + q["decode_ms"])
        assert q["round_trip_ms"] > 0
        assert q["state_bytes"] == pytest.approx(q["bits"] * 4608 * 4096 / 8, abs=1)
    assert qualities["fast"]["bits"] <= qualities["lossless"]["bits"] <= 16


def test_bench_link_to_nobody_says_so() -> None:
    result = mesh("bench", "link", f"mesh://127.0.0.1:{free_port()}")
    assert result.exit_code == FAILED
    assert result.stderr.startswith("error: ") and "try: " in result.stderr
