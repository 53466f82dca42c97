"""House rules: short files and functions, docstrings, one meaning per name, no circles of imports."""

from __future__ import annotations

import ast
import importlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from mesh_core import hookspecs

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "mesh_core": ROOT / "mesh_core",
    "mesh_codec": ROOT / "codec",
    "mesh_flux2": ROOT / "adapters" / "flux2",
    "mesh_klein": ROOT / "adapters" / "klein",
    "mesh_ltx": ROOT / "adapters" / "ltx",
    "comfy_integration": ROOT,
}

LONGEST_FILE, MEDIAN_FILE, LONGEST_FUNCTION = 400, 100, 50

COMFY_NODE = {"define_schema", "validate_inputs", "execute", "get_node_list"}
"""What ComfyUI calls on nodes and extensions; its documentation says what they are for."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def sources() -> dict[Path, ast.Module]:
    """The product's files: path -> syntax tree."""
    found = [p for name, base in PACKAGES.items() for p in sorted((base / name).rglob("*.py"))]
    assert len(found) > 150
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in found}


def place(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}{f':{line}' if line else ''}"


def test_files_are_short() -> None:
    lengths = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {where: n for where, n in lengths.items() if n > LONGEST_FILE} == {}
    assert median(lengths.values()) <= MEDIAN_FILE


def test_functions_are_short() -> None:
    long = [
        f"{place(path, node.lineno)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert long == []


def test_every_file_says_what_it_is_for() -> None:
    assert [place(path) for path, tree in sources().items() if tree.body and not ast.get_docstring(tree)] == []


def test_public_definitions_have_docstrings() -> None:
    """Those that override something inherit theirs: the base says what is meant."""
    bare = [
        f"{place(path, node.lineno)} {'.'.join(names)}"
        for path, tree in sources().items()
        for names, node in _public(tree.body, ())
        if not ast.get_docstring(node) and not _overrides(path, names)
    ]
    assert bare == []


def _public(body: list[ast.stmt], within: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Definition]]:
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield (*within, node.name), node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, (*within, node.name))


def _overrides(path: Path, names: tuple[str, ...]) -> bool:
    """Whether a method stands for one of a base class, which has the docstring, or fills a hook."""
    if names[-1] in vars(hookspecs):
        return True
    if len(names) < 2:
        return False
    if names[-1] in _promised() or any(names[-1] in methods for methods in _inherited(names[-2])):
        return True
    try:
        owner: object = importlib.import_module(_module(path))
    except ModuleNotFoundError as error:
        # What imports ComfyUI is only imported inside it.
        assert str(error.name).partition(".")[0] in ("comfy", "folder_paths", "nodes", "server", "comfy_api"), error
        return names[-1] in COMFY_NODE
    for name in names[:-1]:
        owner = getattr(owner, name)
    return isinstance(owner, type) and any(names[-1] in vars(base) for base in owner.__mro__[1:])


@cache
def _promised() -> set[str]:
    """The methods of the product's protocols, which say there what is meant."""
    protocols = [c for c in _classes().values() if any(ast.unparse(b) == "Protocol" for b in c.bases)]
    return {n.name for c in protocols for n in c.body if isinstance(n, Definition)}


@cache
def _classes() -> dict[str, ast.ClassDef]:
    return {n.name: n for tree in sources().values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}


def _inherited(name: str) -> Iterator[set[str]]:
    """The methods of each of the product's own classes that the class ``name`` derives from."""
    for base in _classes()[name].bases:
        found = _classes().get(ast.unparse(base).rpartition(".")[2])
        if found is not None and found.name != name:
            yield {n.name for n in found.body if isinstance(n, Definition)}
            yield from _inherited(found.name)


def test_a_capitalised_name_has_one_meaning() -> None:
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for path, tree in sources().items():
        for name, line in _capitalised(tree):
            homes[name].append(place(path, line))
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def _capitalised(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """A module's public classes and type aliases."""
    found: dict[str, int] = {}  # a name that both branches of an ``if`` define counts once
    for node in [inner for outer in tree.body for inner in (ast.walk(outer) if isinstance(outer, ast.If) else [outer])]:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        found |= {name: node.lineno for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name)}
    yield from found.items()


PRINTING = re.compile(
    r"print|input|secho|echo|click\.(secho|echo|style|prompt|confirm|pause|edit|progressbar|echo_via_pager)|sys\.std(out|err)\.write(lines)?"
    r"|(\w+\.)?Console|(\w+\.)?tqdm|warnings\.warn|logging\.(getLogger|basicConfig|\w*Handler|debug|info|warning|error|exception)"
)
"""Calls that put text before people."""

MAKES_VISIBLE = {
    "mesh_core/mesh_core/system/terminal.py": "what the command line prints",
    "mesh_core/mesh_core/system/logs.py": "the loggers of the product",
    "mesh_core/mesh_core/bench/processes.py": "JSON, from a process to its parent",
    "comfy_integration/__init__.py": "says that mesh_core is missing, without it",
}
"""Files that may, and for what."""


def test_text_reaches_people_through_the_places_that_make_it_visible() -> None:
    """Names and errors of other machines hold what terminals act on; see `mesh_core.visible`."""
    past = [
        f"{place(path, node.lineno)} {name}"
        for path, tree in sources().items()
        # The codecs see no names: they log what is wrong with this machine's own libraries.
        if path.relative_to(ROOT).as_posix() not in MAKES_VISIBLE and not _of(path, "mesh_codec")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and PRINTING.fullmatch(name := ast.unparse(node.func))
    ]
    assert past == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_circles(package: str) -> None:
    """Imports inside functions and those for type checkers count too, but for what a package offers at its top."""
    files = {_module(path): tree for path, tree in sources().items() if _of(path, package)}
    arrows = {
        name: _imports(tree, files.keys(), package) - {name, package} for name, tree in files.items() if name != package
    }
    circles = [name for name in arrows if name in _reached(arrows, name)]
    assert circles == []


def _of(path: Path, package: str) -> bool:
    return path.is_relative_to(PACKAGES[package] / package)


def _module(path: Path) -> str:
    base = next(base for name, base in PACKAGES.items() if _of(path, name))
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, known: Collection[str], package: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            # ComfyUI gives the pack a name of its own, so that imports itself relatively; it has no folders in it.
            above = [package] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(known)


def _reached(arrows: Mapping[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    ahead = set(arrows[start])
    while ahead:
        reached |= ahead
        ahead = {target for name in ahead for target in arrows.get(name, ())} - reached
    return reached
