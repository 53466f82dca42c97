"""Plugins as a user meets them: real distributions, each case in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

PROBE = Path(__file__).with_name("probe_plugins.py")
Environment = Callable[..., dict[str, str]]


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def zoo_environment(environment: Environment) -> dict[str, str]:
    return environment("good", "broken", "other_major", "misspelled")


@pytest.fixture(scope="module")
def zoo(zoo_environment: dict[str, str]) -> dict[str, Any]:
    """A good plugin among those that fail, each for its own reason."""
    questions = ["wan", "broken", "future", "misspelled", "flux2", "chroma", "No Such!"]
    found: dict[str, Any] = json.loads(run(zoo_environment, str(PROBE), *(f"adapter:{q}" for q in questions)))
    return found


@pytest.fixture(scope="module")
def listed(zoo_environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What ``mesh plugins --json`` prints about the same environment."""
    printed = json.loads(run(zoo_environment, "-m", "mesh_core.cli", "plugins", "--json"))
    assert printed["group"] == "mesh.v1"
    return {report["name"]: report for report in printed["plugins"]}


def test_reading_what_is_installed_imports_nothing(zoo: dict[str, Any]) -> None:
    assert zoo["imported_by_load"] == []


def test_a_good_plugin_works_among_failing_ones(zoo: dict[str, Any]) -> None:
    report = zoo["reports"]["good of mesh-test-good"]
    assert (report["status"], report["version"], report["detail"]) == ("loaded", "1.2.0", "")
    assert report["provides"] == ["adapter wan", "codec wavelets", "transport pigeon", "weight format runes"]
    assert zoo["lookups"]["adapter:wan"] == "Adapter"
    assert zoo["families"] == {"wan": "1.2.0"}


def test_the_listing_shows_commands_too(listed: dict[str, dict[str, Any]]) -> None:
    assert "command greet" in listed["good"]["provides"]


def test_a_plugin_that_fails_at_import_is_reported_with_its_error(listed: dict[str, dict[str, Any]]) -> None:
    assert listed["broken"]["status"] == "broken"
    assert "RuntimeError: libwonder.so.3 is missing" in listed["broken"]["detail"]
    assert "at_import.py" in listed["broken"]["traceback"]


def test_a_plugin_that_registers_the_wrong_thing_is_reported(zoo: dict[str, Any]) -> None:
    report = zoo["reports"]["broken-later of mesh-test-broken"]
    assert report["status"] == "broken"
    assert "mesh_register_transports takes instances of Transport" in report["detail"]


def test_a_misspelled_hook_is_an_error_with_a_suggestion(zoo: dict[str, Any]) -> None:
    report = zoo["reports"]["misspelled of mesh-test-misspelled"]
    assert report["status"] == "broken"
    assert "mesh_register_adaptors, which is no hook" in report["detail"]
    assert "mesh_step_failed" in report["detail"]
    assert report["hint"] == "rename it to mesh_register_adapters"


def test_hooks_without_their_mark_are_an_error(zoo: dict[str, Any]) -> None:
    report = zoo["reports"]["unmarked of mesh-test-misspelled"]
    assert report["status"] == "broken"
    assert "@mesh_core.hookimpl" in report["hint"]


@pytest.mark.parametrize(("name", "upgrade"), [("future", "comfyui-mesh"), ("past", "mesh-test-other-major")])
def test_another_api_major_is_listed_and_not_imported(
    listed: dict[str, dict[str, Any]], name: str, upgrade: str
) -> None:
    assert listed[name]["status"] == "incompatible"
    assert listed[name]["hint"] == f"pip install --upgrade {upgrade}"
    assert listed[name]["traceback"] == ""


def test_a_disabled_plugin_is_not_used(zoo: dict[str, Any]) -> None:
    assert zoo["reports"]["flux2 of comfyui-mesh-flux2"]["status"] == "disabled"
    assert zoo["lookups"]["adapter:flux2"].startswith("PluginNotFound: Adapter 'flux2' (comfyui-mesh-flux2 ")
    assert "MESH_DISABLE_PLUGINS" in zoo["lookups"]["adapter:flux2"]


def test_asking_for_what_is_not_installed_says_what_is_and_what_to_do(zoo: dict[str, Any]) -> None:
    told = zoo["lookups"]["adapter:chroma"]
    assert told == (
        "PluginNotFound: No adapter for 'chroma'. Installed: wan 1.2.0. Try: pip install comfyui-mesh-chroma"
    )
    assert "pip install" not in zoo["lookups"]["adapter:No Such!"]


@pytest.mark.parametrize(
    ("name", "error"), [("broken", "PluginBroken"), ("misspelled", "PluginBroken"), ("future", "PluginIncompatible")]
)
def test_asking_for_a_plugin_that_failed_gives_its_reason(zoo: dict[str, Any], name: str, error: str) -> None:
    report = next(r for r in zoo["reports"].values() if r["name"] == name)
    assert zoo["lookups"][f"adapter:{name}"].startswith(f"{error}: ")
    assert report["detail"] in zoo["lookups"][f"adapter:{name}"]


def test_ends_tell_each_other_only_what_is_in_use(zoo: dict[str, Any]) -> None:
    assert zoo["versions"]["comfyui-mesh"] == version("comfyui-mesh")
    assert zoo["versions"]["mesh-test-good"] == "1.2.0"
    assert not {"mesh-test-broken", "mesh-test-other-major", "comfyui-mesh-flux2"} & set(zoo["versions"])


def test_two_distributions_with_one_name_are_both_named_and_neither_used(environment: Environment) -> None:
    found = json.loads(run(environment("good", "duplicate"), str(PROBE), "adapter:good", "adapter:wan", "codec:raw"))
    both = "mesh-test-duplicate 7.0.0 and by mesh-test-good 1.2.0"
    assert found["reports"]["good of mesh-test-good"]["status"] == "conflict"
    assert found["reports"]["good of mesh-test-duplicate"]["status"] == "conflict"
    assert found["lookups"]["adapter:good"].startswith("PluginConflict: ")
    assert both in found["lookups"]["adapter:good"]
    assert found["lookups"]["adapter:wan"].startswith("PluginNotFound: ")
    assert found["lookups"]["codec:raw"] == "RawCodec"


@pytest.fixture(scope="module")
def rivals_environment(environment: Environment) -> dict[str, str]:
    return environment("good", "same_family")


@pytest.fixture(scope="module")
def rivals(rivals_environment: dict[str, str]) -> dict[str, Any]:
    questions = ["adapter:wan", "adapter:qwen-image", "codec:wavelets", "transport:inproc"]
    found: dict[str, Any] = json.loads(run(rivals_environment, str(PROBE), *questions))
    return found


def test_one_family_registered_twice_is_an_error_and_the_rest_works(rivals: dict[str, Any]) -> None:
    told = rivals["lookups"]["adapter:wan"]
    assert told.startswith("PluginConflict: The adapter 'wan' is claimed by mesh-test-good 1.2.0 and by mesh-test-same")
    assert rivals["lookups"]["adapter:qwen-image"] == "QwenImage"
    assert rivals["lookups"]["codec:wavelets"] == "Wavelets"
    report = rivals["reports"]["same-family of mesh-test-same-family"]
    assert (report["status"], report["provides"]) == ("conflict", ["adapter qwen-image"])
    assert "adapter 'wan'" in report["detail"] and "transport 'inproc'" in report["detail"]


def test_no_plugin_takes_a_name_from_the_core(rivals: dict[str, Any], rivals_environment: dict[str, str]) -> None:
    assert rivals["lookups"]["transport:inproc"] == "InprocTransport"
    printed = json.loads(run(rivals_environment, "-m", "mesh_core.cli", "plugins", "--json"))
    rival = next(r for r in printed["plugins"] if r["name"] == "same-family")
    assert "command 'plugins' is claimed by comfyui-mesh" in rival["detail"]
    assert "command plugins" not in rival["provides"]


# One test for each hook: test_public_surface.py checks that none is missing.


def test_hook_mesh_register_adapters(zoo: dict[str, Any]) -> None:
    assert "adapter wan" in zoo["reports"]["good of mesh-test-good"]["provides"]


def test_hook_mesh_register_codecs(zoo: dict[str, Any]) -> None:
    assert "codec wavelets" in zoo["reports"]["good of mesh-test-good"]["provides"]


def test_hook_mesh_register_transports(zoo: dict[str, Any]) -> None:
    assert "transport pigeon" in zoo["reports"]["good of mesh-test-good"]["provides"]


def test_hook_mesh_register_weight_formats(zoo: dict[str, Any]) -> None:
    assert "weight format runes" in zoo["reports"]["good of mesh-test-good"]["provides"]


def test_hook_mesh_add_commands(zoo_environment: dict[str, str]) -> None:
    assert run(zoo_environment, "-m", "mesh_core.cli", "greet", "Ada") == "Hello, Ada.\n"


def test_hook_mesh_propose_split(zoo: dict[str, Any]) -> None:
    assert zoo["hooks"]["split"] == ["0:3", "3:9"]


def test_hook_mesh_choose_codec(zoo: dict[str, Any]) -> None:
    assert zoo["hooks"]["codec"] == "wavelets"
    assert zoo["hooks"]["codec_by_default"] == "raw"


def test_hook_mesh_place_lora(zoo: dict[str, Any]) -> None:
    assert zoo["hooks"]["lora"] == "ink.safetensors on attic"


def _calls(environment: dict[str, str]) -> list[str]:
    return Path(environment["MESH_TEST_CALLS"]).read_text(encoding="utf-8").splitlines()


def test_hook_mesh_step_started(zoo: dict[str, Any], zoo_environment: dict[str, str]) -> None:
    assert "started 3" in _calls(zoo_environment)


def test_hook_mesh_step_finished(zoo: dict[str, Any], zoo_environment: dict[str, str]) -> None:
    assert "finished 3 in 7.5 ms" in _calls(zoo_environment)


def test_hook_mesh_step_failed(zoo: dict[str, Any], zoo_environment: dict[str, str]) -> None:
    assert "failed 4: too hot" in _calls(zoo_environment)
