"""``mesh comfy``: make the nodes of an installed package known to a ComfyUI. Imports neither ComfyUI nor the nodes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from mesh_core.errors import ConfigError
from mesh_core.system.config import atomic_write
from mesh_core.system.terminal import say

FOLDER = "comfyui-mesh"
WORKFLOWS = "example_workflows"
"""Where ComfyUI looks for the templates of a node pack."""
_TEXT = '''"""Written by mesh comfy link; loads the nodes from the installed package."""

from comfy_integration import *  # noqa: F403
'''


@click.group()
def comfy() -> None:
    """Use the mesh in ComfyUI."""


@comfy.command()
@click.argument("path", type=click.Path(path_type=Path))
def link(path: Path) -> None:
    """Make the nodes known to the ComfyUI in the folder PATH.

    For an installation with pip, into ComfyUI's own Python. A clone of the repository in custom_nodes needs no link.
    """
    nodes = path / "custom_nodes"
    if not nodes.is_dir() and (path / "ComfyUI" / "custom_nodes").is_dir():
        nodes = path / "ComfyUI" / "custom_nodes"
    if not nodes.is_dir():
        raise ConfigError(f"{path} is no ComfyUI: it has no custom_nodes.", hint="the folder that holds main.py")
    package = find_spec("comfy_integration")
    if package is None or package.origin is None:
        raise ConfigError(
            "The nodes are not part of this installation; it is linked to a checkout.",
            hint="a link to the checkout in custom_nodes, or pip install comfyui-mesh",
        )
    target = nodes / FOLDER / "__init__.py"
    if (nodes / FOLDER / "pyproject.toml").exists():
        raise ConfigError(
            f"{nodes / FOLDER} is a clone of the repository already; it needs no link.", hint="restart ComfyUI"
        )
    allowed = "permission to write there, or another ComfyUI"
    atomic_write(target, _TEXT.encode(), hint=allowed)
    for workflow in (Path(package.origin).parent / WORKFLOWS).glob("*.json"):
        atomic_write(target.parent / WORKFLOWS / workflow.name, workflow.read_bytes(), hint=allowed)
    say(f"Linked {target.parent}. Restart ComfyUI; the nodes are in the category mesh.")
