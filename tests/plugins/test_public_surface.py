"""What other people's code relies on: names, hooks, errors; and that the reference tells the truth about them."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import mesh_core
from mesh_core import errors, hookspecs
from tests.plugins.public_names import PUBLIC

ROOT = Path(__file__).parents[2]
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("mesh_"))
DISTRIBUTIONS = ["comfyui-mesh", "comfyui-mesh-codec", "comfyui-mesh-flux2", "comfyui-mesh-klein", "comfyui-mesh-ltx"]


def python(code: str, where: Path) -> str:
    """What ``code`` prints in a fresh process that runs in the folder ``where``."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=where, env=clean, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_all_is_what_is_visible() -> None:
    assert dir(mesh_core) == sorted(mesh_core.__all__)
    assert list(mesh_core.__all__) == sorted(mesh_core.__all__)
    for name in mesh_core.__all__:
        assert getattr(mesh_core, name) is not None, name


def test_every_error_is_public() -> None:
    defined = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.MeshError)}
    assert defined == {n for n in mesh_core.__all__ if isinstance(getattr(mesh_core, n), type)}


def test_the_names_for_type_checkers_are_those_that_are_resolved() -> None:
    tree = ast.parse(inspect.getsource(mesh_core))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(imported) | {"__version__"} == set(mesh_core.__all__)
    for name, module in imported.items():
        assert getattr(mesh_core, name).__module__.startswith(str(module)) or name == "hookimpl", name


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_have_exactly_the_names_that_are_promised(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(PUBLIC[name].split())
    assert all(getattr(module, public) is not None for public in PUBLIC[name].split())


@pytest.mark.parametrize("module", [mesh_core.model, hookspecs], ids=lambda module: str(module.__name__))
def test_names_that_are_loaded_when_they_are_used_are_those_for_type_checkers(module: ModuleType) -> None:
    tree = ast.parse(inspect.getsource(module))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: f"{node.module}" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    homes = {n: h if "." in h else f"{module.__name__}.{h}" for n, h in vars(module)["_HOMES"].items()}
    assert homes == imported
    assert dir(module) == sorted(module.__all__)


def imports_of_the_core(text: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that some code imports from the core."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mesh_core":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "mesh_core")


def test_adapters_and_plugins_import_public_names_only() -> None:
    folders = (ROOT / "adapters", ROOT / "tests" / "plugins" / "samples", ROOT / "docs" / "examples")
    code = {str(p.relative_to(ROOT)): p.read_text("utf-8") for folder in folders for p in folder.rglob("*.py")}
    for name in ("write-an-adapter.md", "write-a-transport.md", "write-a-codec.md"):
        page = (ROOT / "docs" / "how-to" / name).read_text("utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        code |= {f"{name}:{number}": block for number, block in enumerate(blocks)}
    public = {module: set(names.split()) for module, names in PUBLIC.items()} | {"mesh_core": set(mesh_core.__all__)}
    found = {(place, *name) for place, text in code.items() for name in imports_of_the_core(text)}
    assert {place for place, _, _ in found} >= {"write-an-adapter.md:0"} | {
        f"adapters/{family}/mesh_{family}/plugin.py" for family in ("flux2", "klein", "ltx")
    }
    assert sorted(name for name in found if name[2] not in public.get(name[1], ())) == []


def test_the_page_for_authors_names_every_public_module() -> None:
    page = (ROOT / "docs" / "how-to" / "write-an-adapter.md").read_text("utf-8")
    listed = re.findall(r"^\| `(mesh_core[\w.]*)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(["mesh_core", *PUBLIC])


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, mesh_core; print(sorted({'torch', 'zmq', 'click', 'pluggy', 'mesh_codec'} & set(sys.modules)))"
    assert python(code, tmp_path) == "[]"


@pytest.mark.parametrize("where", [".", "mesh_core", "codec", "adapters", "/"])
def test_one_package_from_wherever_python_is_started(where: str) -> None:
    # The folders at the top have the names of packages: without care they would be found first, and empty.
    expected = str(ROOT / "mesh_core" / "mesh_core" / "__init__.py")
    assert python("import mesh_core; print(mesh_core.__file__)", ROOT / where) == expected


def test_all_distributions_are_of_one_version() -> None:
    assert {version(name) for name in DISTRIBUTIONS} == {mesh_core.__version__}


def test_the_core_names_no_model_family() -> None:
    words = re.compile(r"flux|klein|ltx|lightricks", re.IGNORECASE)
    for folder in (ROOT / "adapters").iterdir():
        assert words.search(folder.name), f"the adapter {folder.name} is looked for too"
    sources = sorted((ROOT / "mesh_core" / "mesh_core").rglob("*.py"))
    assert sources
    assert [str(p) for p in sources if words.search(p.read_text(encoding="utf-8"))] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'splitt'"):
        mesh_core.splitt  # noqa: B018


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_and_tested(name: str) -> None:
    hook = getattr(hookspecs, name)
    assert inspect.getdoc(hook)
    assert all(p.annotation is not p.empty for p in inspect.signature(hook).parameters.values())
    assert f"## {name}\n" in (ROOT / "docs" / "reference" / "hooks.md").read_text(encoding="utf-8")
    tests = Path(__file__).with_name("test_plugins.py").read_text(encoding="utf-8")
    assert re.search(rf"^def test_hook_{name}\(", tests, re.MULTILINE)


def test_the_generated_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "_generate.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
