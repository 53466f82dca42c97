"""For all tests: the user's own settings and keys stay untouched, and torch computes in one thread.

Matrix libraries split sums over threads; with one thread, what two ends compute is equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mesh_core.builtin import installed_plugins
from tests.support.environments import environment, wheels
from tests.support.workers import mesh_home

__all__ = ["environment", "wheels"]


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.set_num_threads(1)
    with mesh_home(tmp_path_factory.mktemp("home")) as home:
        yield home


@pytest.fixture(scope="module", autouse=True)
def _plugins_as_installed() -> None:
    """A module may have cached the plugins of an environment that it made up."""
    installed_plugins.cache_clear()
