"""What a pipeline made, as a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mesh_core.errors import ConfigError
from mesh_core.programs.media import save


class Interrupted:
    """A picture for which there is room only in part."""

    def save(self, file: Path) -> None:
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")


def test_a_full_disk_costs_no_earlier_picture(tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    save(None, SimpleNamespace(images=[Image.new("RGB", (8, 8), "red")]), {}, file)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="No space left"):
        save(None, SimpleNamespace(images=[Interrupted()]), {}, file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
