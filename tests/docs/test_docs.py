"""The documentation is true: links lead somewhere, commands and their options exist, code imports what it names."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mesh_core.cli import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(mesh [a-z][^`\n]*)`")


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page: Path) -> None:
    links = [target for target in _LINK.findall(page.read_text("utf-8")) if "://" not in target]
    assert [t for t in links if not (page.parent / t).exists()] == []


def _commands(page: Path) -> Iterator[list[str]]:
    text = page.read_text("utf-8")
    lines = [line for _, body in _FENCE.findall(text) for line in body.splitlines()]
    for line in [*lines, *_INLINE.findall(text)]:
        if line.strip().startswith("mesh "):
            yield shlex.split(line.strip(), comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in _commands(page):
        command: click.Command = cli
        with click.Context(cli) as context:
            while isinstance(command, click.Group) and words and not words[0].startswith("-"):
                found = command.get_command(context, words[0].rstrip(".,;:"))
                assert found is not None, f"mesh {' '.join(words)}: there is no such command"
                command, words = found, words[1:]
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.partition("=")[0] for word in words if word.startswith("-") and word != "--help"}
        assert used <= known, f"{command.name} has no option {sorted(used - known)}"


def _python(page: Path) -> Iterator[ast.AST]:
    for language, body in _FENCE.findall(page.read_text("utf-8")):
        if language == "python":
            yield from ast.walk(ast.parse(body))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text("utf-8") and p.name != "hooks.md"], ids=_id
)
def test_code_uses_names_that_exist(page: Path) -> None:
    for node in _python(page):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("mesh_core", "mesh_flux2")):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mesh_core":
            assert hasattr(importlib.import_module("mesh_core"), node.attr), ast.unparse(node)


def test_no_machine_of_ours_is_named() -> None:
    named = [p for p in PAGES if re.search(r"(?<![\w.])/(?:work|root|tmp)/", p.read_text("utf-8"))]
    assert [_id(p) for p in named] == []
