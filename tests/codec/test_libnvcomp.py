"""nvCOMP's library as far as it works without a GPU: it loads, its functions are there, its structures are laid out."""

from __future__ import annotations

import platform
from types import SimpleNamespace

import pytest

from mesh_codec import CodecUnsupported
from mesh_codec.ans import libnvcomp
from mesh_codec.ans.chunks import CHUNK, padded
from mesh_codec.ans.libnvcomp import MAJOR, NvCompLibrary

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="make test brings the library on Linux"
)


def test_the_library_is_of_the_version_that_this_is_written_for():
    assert NvCompLibrary().version[0] == MAJOR


def test_every_chunk_has_room_though_nothing_can_be_saved():
    rooms = [NvCompLibrary().room(size) for size in (1 << 12, CHUNK)]
    assert rooms[0] > 1 << 12 and CHUNK < rooms[1] < 2 * CHUNK
    assert padded(rooms[1]) == rooms[1], "rooms side by side begin at multiples of 16"


def test_it_needs_no_memory_of_its_own():
    for coding in (True, False):
        assert NvCompLibrary().scratch(128, CHUNK, 0, coding=coding) < 1 << 20


def test_options_that_the_library_does_not_know_are_an_error(monkeypatch):
    # The structures arrive whole: the library sees this field.
    monkeypatch.setattr(libnvcomp, "_COMPRESS", libnvcomp._Compress(data_type=77, states=1))
    with pytest.raises(CodecUnsupported, match="status"):
        NvCompLibrary().room(CHUNK)


def test_another_version_is_named(monkeypatch):
    monkeypatch.setattr(libnvcomp, "MAJOR", MAJOR + 1)
    with pytest.raises(CodecUnsupported, match=f"not {MAJOR + 1}"):
        NvCompLibrary()


def test_a_library_that_does_not_load_is_named(monkeypatch):
    monkeypatch.setattr(libnvcomp, "import_module", lambda name: SimpleNamespace(load_library=lambda: None))
    with pytest.raises(CodecUnsupported, match="could not be loaded"):
        NvCompLibrary()


def test_without_the_library_people_are_told_what_to_install(monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(libnvcomp, "import_module", fail)
    with pytest.raises(CodecUnsupported, match="pip install nvidia-libnvcomp"):
        NvCompLibrary()
