"""A pipeline that many tests split."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support import pipelines
from tests.support.split_klein import SplitKlein, split_klein


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SplitKlein]:
    with split_klein(tmp_path_factory.mktemp("models")) as klein:
        yield klein


@pytest.fixture(scope="module")
def expected(klein: SplitKlein) -> torch.Tensor:
    """What it draws when it is whole."""
    return pipelines.run(klein.whole())
