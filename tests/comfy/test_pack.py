"""The node pack outside of a run: what it asks for, what it ships, and what it says when something is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mesh_core.programs.comfy import Expected
from mesh_core.transport.keys import KeyStore
from tests.comfy.install import ComfyUI
from tests.comfy.server import ROOT, Server

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _needed(file: Path) -> set[str]:
    lines = tomllib.loads(file.read_text("utf-8"))["project"]["dependencies"]
    return {line for line in lines if not line.startswith(("comfyui-mesh", "torch", "numpy"))}


def test_requirements_are_what_the_packages_need() -> None:
    """ComfyUI-Manager installs requirements.txt, then the packages of this repository without what they need."""
    folders = (ROOT, ROOT / "codec", ROOT / "adapters" / "flux2", ROOT / "adapters" / "klein")
    listed = {line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if not line.startswith("#")}
    assert listed == set().union(*(_needed(folder / "pyproject.toml") for folder in folders))


def test_the_package_carries_the_nodes_and_their_page(tmp_path: Path) -> None:
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*wheel, str(ROOT)], check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {"comfy_integration/__init__.py", "comfy_integration/web/mesh.js", "mesh_core/__init__.py"} <= set(names)
    assert {f"comfy_integration/web/docs/{n}.md" for n in ("MeshSplit", "MeshWorkers", "MeshRemoteLora")} <= set(names)
    workflows = {f"comfy_integration/example_workflows/{file.name}" for file in (ROOT / "examples").glob("mesh-*.json")}
    assert len(workflows) == 3 and workflows <= set(names)
    assert not [name for name in names if name.startswith(("tests", "install", "__init__"))]


def test_link(tmp_path: Path) -> None:
    def link(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mesh_core.cli", "comfy", "link", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    shutil.copytree(ROOT / "comfy_integration", tmp_path / "installed" / "comfy_integration")
    workflow = ROOT / "examples" / "mesh-tiny-klein.json"
    (tmp_path / "installed" / "comfy_integration" / "example_workflows").mkdir()
    shutil.copy(workflow, tmp_path / "installed" / "comfy_integration" / "example_workflows")
    (tmp_path / "portable" / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    done = link(tmp_path / "portable")
    assert done.returncode == 0, done.stderr
    linked = tmp_path / "portable" / "ComfyUI" / "custom_nodes" / "comfyui-mesh" / "__init__.py"
    assert "comfy_integration" in linked.read_text("utf-8")
    assert (linked.parent / "example_workflows" / workflow.name).read_bytes() == workflow.read_bytes()
    assert "has no custom_nodes" in link(tmp_path).stderr


def test_what_is_missing_becomes_a_message_in_the_nodes() -> None:
    """Outside of ComfyUI there is no V3 schema, as in a ComfyUI that is too old."""
    code = (
        "import comfy_integration as pack; node = pack.NODE_CLASS_MAPPINGS['MeshSplit'];"
        "print(node.VALIDATE_INPUTS()); print(node.RETURN_TYPES, sorted(pack.NODE_CLASS_MAPPINGS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "too old for ComfyUI-Mesh. Try: update ComfyUI" in done.stdout and "MeshRemoteLora" in done.stdout


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        (Expected("json", "loads", ("s",)), None),
        (Expected("json", "loads", ("s", "speed")), "json.loads has no parameter speed"),
        (Expected("json", "JSONDecoder.vanished"), "json.JSONDecoder.vanished is missing"),
        (Expected("comfy_of_another_age", "x"), "comfy_of_another_age.x is missing"),
    ],
)
def test_a_changed_extension_point_is_named(expected: Expected, said: str | None) -> None:
    problem = expected.problem()
    assert problem is None if said is None else said in (problem or "")


def test_every_input_has_a_tooltip_and_every_node_a_page(server: Server) -> None:
    pages = ROOT / "comfy_integration" / "web" / "docs"
    nodes = {name: info for name, info in server.get("/object_info").items() if info["category"] == "mesh"}
    assert sorted(nodes) == ["MeshLoadDiffusionModel", "MeshRemoteLora", "MeshSplit", "MeshWorkers"]
    for name, info in nodes.items():
        assert (pages / f"{name}.md").is_file()
        for inputs in info["input"].values():
            for key, value in inputs.items():
                if key != "unique_id":
                    assert value[1].get("tooltip"), f"{name}.{key}"


_POSTED = ("workers", "workers/rename", "workers/remove", "workers/test", "loras")
_ROUTES = (("status", None), ("workers", None), *((route, b"{}") for route in _POSTED))
_JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        *(b"[" * 100_000, b'{"address":' * 20_000, b'{"address": [[]]}', b'{"address": 1}', b"[]", b"", b"\xff", b"{"),
        b'{"address": "' + b"x" * 100_000 + b'"}',
        b'{"address": "a.b:1", "invite": "mesh://a.b:1?token=x"}',
    ],
    ids=["lists", "objects", "a list", "a number", "no object", "nothing", "no text", "half", "long", "unknown"],
)
def test_whatever_is_posted_gets_an_answer(server: Server, body: bytes) -> None:
    for route in _POSTED:
        status, text = server.answer(f"/mesh/{route}", _JSON, body)
        assert status == 400 and json.loads(text)["error"], (route, text)


def test_pages_of_other_sites_are_refused_by_every_route(server: Server, home: Path) -> None:
    known = f"127.0.0.1:{server.port}"
    hostile: tuple[dict[str, str], ...] = (
        {"Host": f"rebound.example:{server.port}"},
        {"Host": f"rebound.example:{server.port}", "Origin": f"http://rebound.example:{server.port}"},
        {"Host": known, "Origin": "https://evil.example"},
        {"Host": known, "Origin": f"http://127.0.0.1:{server.port + 1}"},
        {"Host": known, "Origin": "null"},
        {"Host": known, "Sec-Fetch-Site": "cross-site"},
    )
    before = KeyStore(home / "config").workers()
    for headers in hostile:
        for route, body in _ROUTES:
            assert server.answer(f"/mesh/{route}", {**headers, **_JSON}, body)[0] == 403, (route, headers)
    assert KeyStore(home / "config").workers() == before
    status, text = server.answer("/mesh/workers", hostile[0])
    assert status == 403 and 'hosts = ["rebound.example"] under [comfy]' in json.loads(text)["hint"]
    for host in (known, f"localhost:{server.port}", "studio.local", f"[::1]:{server.port}"):
        for extra in ({}, {"Origin": f"http://{host}"}, {"Sec-Fetch-Site": "same-origin"}):
            assert server.answer("/mesh/workers", {"Host": host, **extra})[0] == 200, (host, extra)


def test_a_name_that_the_user_listed(server: Server, home: Path) -> None:
    settings = home / "config" / "config.toml"
    before = settings.read_text("utf-8")
    proxied = {"Host": "draw.example", "Origin": "https://draw.example"}
    assert server.answer("/mesh/workers", proxied)[0] == 403
    try:
        settings.write_text(before + '[comfy]\nhosts = ["draw.example"]\n', "utf-8")
        assert server.answer("/mesh/workers", proxied)[0] == 200
        assert server.answer("/mesh/workers", {"Host": "evil.example"})[0] == 403
    finally:
        settings.write_text(before, "utf-8")


def test_start_up_waits_for_nothing_slow(comfy: ComfyUI, server: Server) -> None:
    """What ComfyUI imports when it starts; sessions, sockets and adapters are imported when a node or the page asks."""
    code = (
        "import sys, torch; from comfy_integration import compatibility, node_settings, pack_state, routes, status;"
        "print([m for m in ('zmq', 'diffusers', 'mesh_core.host.session', 'mesh_flux2') if m in sys.modules])"
    )
    done = subprocess.run([str(comfy.python), "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    assert server.get("/mesh/status")["message"] == ""
