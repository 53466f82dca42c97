"""Workers to negotiate with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.negotiating import starting
from tests.support.workers import ThreadWorker


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[ThreadWorker]]]:
    with starting(tmp_path) as begin:
        yield begin
