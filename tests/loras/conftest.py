"""A model that LoRAs are for."""

from __future__ import annotations

import pytest

from mesh_core.builtin import load_plugins
from mesh_core.model.library import Checkpoint
from tests.adapters import tiny
from tests.support.splitting import checkpoint_at


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small Klein, alone in its folder."""
    return checkpoint_at(tiny.saved(tmp_path_factory.mktemp("models") / "klein"), load_plugins())
