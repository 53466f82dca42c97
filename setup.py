"""Puts the ComfyUI nodes and their example workflows into the wheel; everything else is in pyproject.toml.

They are no package of pyproject.toml because setuptools would then install a checkout through an import hook, and the
folder ``mesh_core`` of the current directory would hide the package of that name.
"""

from pathlib import Path
from shutil import copy, copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithNodes(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "comfy_integration"
            copytree("comfy_integration", target, ignore=ignore_patterns("__pycache__"), dirs_exist_ok=True)
            (target / "example_workflows").mkdir(exist_ok=True)
            for workflow in Path("examples").glob("mesh-*.json"):
                copy(workflow, target / "example_workflows")


setup(cmdclass={"build_py": BuildWithNodes})
