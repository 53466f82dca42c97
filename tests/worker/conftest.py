"""A model to serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters import tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Klein, alone in its folder."""
    return tiny.saved(tmp_path_factory.mktemp("models") / "klein")
