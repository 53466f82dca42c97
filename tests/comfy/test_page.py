"""ComfyUI's page in a real browser: the workflow opens, the node lives, the settings add a worker, a picture comes out.

Screenshots go to the folder that MESH_SCREENSHOTS names, to show in the documentation; else to a temporary one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright

from mesh_core.transport.curve import new_key_pair
from mesh_core.transport.invites import create_invite
from mesh_core.transport.keys import KeyStore, KnownWorker
from tests.comfy.server import ROOT, Server
from tests.support.workers import ProcessWorker, mesh_home, process_worker, wait_until

WORKFLOWS = sorted((ROOT / "examples").glob("mesh-*.json"))
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_PATIENCE = 120_000
_CANVAS = {"x": 62, "y": 130, "width": 1100, "height": 560}
_WIDGETS = "window.app.graph.nodes.find(n => n.type === 'MeshSplit').widgets"
_COMBO = f"{_WIDGETS}.find(w => w.name === 'worker')"


def _chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "The page is tested in a browser. Try: apt-get install chromium"
    return found


@pytest.fixture(scope="module")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    _set(server, vue=False)
    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        size = {"width": 1400, "height": 900}
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=_chromium(), args=list(_FLAGS), headless=True, viewport=size
        )
        page = context.new_page()
        page.set_default_timeout(_PATIENCE)
        _open(page, server)
        yield page
        context.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.environ.get("MESH_SCREENSHOTS") or tmp_path_factory.mktemp("shots"))


def _set(server: Server, *, vue: bool) -> None:
    plain = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
    server.send("/settings", {**plain, "Comfy.VueNodes.Enabled": vue})


def _open(page: Page, server: Server) -> None:
    page.goto(server.url)
    page.wait_for_function("window.app?.graph && window.app.extensionManager")
    page.wait_for_selector("canvas#graph-canvas")
    page.wait_for_timeout(2000)


def _load(page: Page, workflow: Any) -> None:
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(700)
    page.evaluate(
        """() => {
          const { ds } = window.app.canvas, [x, y] = window.app.graph.nodes.find(n => n.type === "MeshSplit").pos;
          ds.scale = 1;
          ds.offset = [330 - x, 170 - y];
          window.app.canvas.setDirty(true, true);
        }"""
    )


def _open_settings(page: Page) -> None:
    page.evaluate("window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    page.get_by_text("Mesh", exact=True).first.click()
    page.wait_for_selector(".mesh-page")


def _run_at(page: Page, address: str, local: int) -> None:
    """Run the workflow that is open, with ``address`` pasted into its node."""
    for name, value in (("worker", "pasted below"), ("address", address), ("local_blocks", local)):
        found = f"{_WIDGETS}.find(w => w.name === '{name}')"
        page.evaluate(f"value => {{ {found}.value = value }}", value)
    page.evaluate("window.app.queuePrompt(0)")


def _workflow(name: str) -> Any:
    return json.loads((ROOT / "examples" / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_the_examples_open_without_missing_nodes(page: Page, file: Path) -> None:
    workflow = json.loads(file.read_text("utf-8"))
    kinds = sorted({node["type"] for node in workflow["nodes"]})
    assert "MeshSplit" in kinds
    missing = page.evaluate("kinds => kinds.filter(kind => !(kind in LiteGraph.registered_node_types))", kinds)
    assert missing == []
    _load(page, workflow)
    assert page.evaluate("window.app.graph.nodes.length") == len(workflow["nodes"])
    marked = page.evaluate("window.app.graph.nodes.filter(node => node.has_errors).map(node => node.type)")
    assert all("Load" in kind for kind in marked), marked  # later pages mark those whose file is not here
    # What the workflow stores is where the node expects it.
    values = page.evaluate(f"Object.fromEntries({_WIDGETS}.map(w => [w.name, w.value]))")
    assert values["quality"] == "lossless" and values["on_failure"] == "wait for it" and values["address"] == ""


def test_a_worker_is_added_renamed_and_tested(page: Page, worker: ProcessWorker, home: Path, shots: Path) -> None:
    with mesh_home(home):
        invite = create_invite(worker.address.partition("?")[0], name="shelf", keys=KeyStore())
    place = str(invite.place.netloc)
    _open_settings(page)
    page.fill(".mesh-invite", f'mesh join "{invite}"')
    page.click(".mesh-form .mesh-button")
    row = f'.mesh-row[data-address="{place}"]'
    page.wait_for_selector(row)
    assert [w.name for w in KeyStore(home / "config").workers() if w.address == place] == ["shelf"]
    page.fill(f"{row} .mesh-input", "the machine in the attic")
    page.press(f"{row} .mesh-input", "Enter")
    wait_until(lambda: any(w.name == "the machine in the attic" for w in KeyStore(home / "config").workers()), 20)
    page.click(f"{row} .mesh-button >> text=Test")
    page.locator(f"{row} .mesh-result", has_text="answers in").wait_for()
    page.screenshot(path=shots / "comfyui-settings.png")
    page.fill(".mesh-invite", "mesh://example")
    page.click(".mesh-form .mesh-button")
    page.wait_for_selector(".mesh-said.mesh-bad")
    page.keyboard.press("Escape")
    page.wait_for_function(
        f"choice => {_COMBO}.options.values.includes(choice)", arg=f"the machine in the attic @ {place}"
    )


def test_a_picture_with_the_node_live(page: Page, server: Server, worker: ProcessWorker, shots: Path) -> None:
    _load(page, _workflow("mesh-tiny-klein"))
    place = worker.address.removeprefix("mesh://").partition("?")[0]
    page.evaluate(f"choice => {{ {_COMBO}.value = choice }}", f"the machine in the attic @ {place}")
    assert page.locator(".mesh-panel").inner_text() == "Not run yet."
    page.evaluate("window.app.queuePrompt(0)")
    page.wait_for_selector('.mesh-panel[data-state="connected"] .mesh-bar')
    text = page.locator(".mesh-panel").inner_text()
    assert "connected" in text and "shelf" in text and "crossed" in text and "raw" in text
    page.wait_for_function("Object.values(window.app.nodeOutputs ?? {}).some(output => output.images?.length)")
    page.wait_for_timeout(1500)
    page.screenshot(path=shots / "comfyui-node.png", clip=_CANVAS)
    pictures = list((server.base / "output").glob("mesh_*.png"))
    assert pictures and pictures[0].stat().st_size > 2000


def test_the_panel_in_vue_nodes(page: Page, server: Server, shots: Path) -> None:
    _set(server, vue=True)
    _open(page, server)
    _load(page, _workflow("mesh-tiny-klein"))
    panel = page.locator("[data-node-id] .mesh-panel")
    panel.wait_for(state="visible")
    assert "crossed" in panel.inner_text()  # the page caught up with the run before it was opened
    page.wait_for_timeout(1000)
    page.screenshot(path=shots / "comfyui-node-vue.png", clip=_CANVAS)
    _set(server, vue=False)


def test_a_worker_that_loads_then_one_with_another_key(page: Page, server: Server, base: Path, home: Path) -> None:
    _open(page, server)
    _load(page, _workflow("mesh-tiny-klein"))
    page.evaluate(
        """() => {
          const panel = document.querySelector(".mesh-panel"), seen = window.meshSeen = [];
          const note = () => seen.push(panel.querySelector(".mesh-state")?.textContent);
          new MutationObserver(note).observe(panel, { childList: true });
        }"""
    )
    with process_worker(base / "models" / "diffusion_models", home=home, name="fresh") as fresh:
        _run_at(page, fresh.address, 5)
        page.wait_for_selector('.mesh-panel[data-state="connected"]:has-text("fresh") .mesh-bar')
        seen = [text for text in page.evaluate("window.meshSeen") if text]
        assert [text for text in seen if re.fullmatch(r"loading \d+ %", text)], seen

        place, keys = fresh.address.removeprefix("mesh://").partition("?")[0], KeyStore(home / "config")
        keys.remember(KnownWorker(place, new_key_pair()[0], "impostor"))
        _run_at(page, f"mesh://{place}", 4)  # another cut connects anew
        page.wait_for_selector('.mesh-panel[data-state="wrong key"]')
        text = page.locator(".mesh-panel").inner_text()
        assert text.startswith("wrong key") and "another key than the one that is expected" in text
        keys.forget(place)
    page.keyboard.press("Escape")


def test_remove_forgets_a_worker(page: Page, worker: ProcessWorker, home: Path) -> None:
    place = worker.address.removeprefix("mesh://").partition("?")[0]
    assert KeyStore(home / "config").worker(place) is not None
    _open_settings(page)
    row = page.locator(f'.mesh-row[data-address="{place}"]')
    row.get_by_text("Remove").click()
    row.wait_for(state="detached")
    assert KeyStore(home / "config").worker(place) is None
    page.keyboard.press("Escape")
    page.wait_for_function(f"place => !{_COMBO}.options.values.some(choice => choice.includes(place))", arg=place)


def test_no_address_from_a_query_string_is_connected_to(server: Server) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(1.0)
        address = f"127.0.0.1:{trap.getsockname()[1]}"
        for path in ("status", "workers", "workers/test", "loras"):
            for method in ("GET", "POST"):
                code = server.status(f"/mesh/{path}?address={address}&invite=mesh://{address}", method)
                assert code == 200 if (method, path) in (("GET", "status"), ("GET", "workers")) else code >= 400
        unknown = server.status("/mesh/workers/test", "POST", {"address": address})
        assert unknown == 400
        with pytest.raises(TimeoutError):
            trap.accept()
