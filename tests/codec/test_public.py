from __future__ import annotations

import types

import msgpack
import pluggy
import pytest
import torch

import mesh_codec
from mesh_codec import plugin


def test_all_is_exactly_what_is_visible():
    public = {
        name
        for name, value in vars(mesh_codec).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public == set(mesh_codec.__all__)


def registered() -> list[mesh_codec.Codec]:
    manager = pluggy.PluginManager("mesh")
    hookspec = pluggy.HookspecMarker("mesh")

    class Spec:
        @hookspec
        def mesh_register_codecs(self, register): ...

    manager.add_hookspecs(Spec)
    manager.register(plugin)
    manager.check_pending()
    found: list[mesh_codec.Codec] = []
    manager.hook.mesh_register_codecs(register=found.append)
    return found


def test_the_plugin_registers_all_codecs():
    assert [codec.name for codec in registered()] == ["raw", "lossless", "entropy", "hevc"]


@pytest.mark.parametrize("codec", registered(), ids=lambda c: c.name)
def test_headers_settings_and_capabilities_survive_msgpack(codec):
    agreed = codec.settings("fast", msgpack.unpackb(msgpack.packb(codec.capabilities())))
    agreed = msgpack.unpackb(msgpack.packb(agreed))
    tensor = torch.randn(2, 70, 8)
    coded = codec.encoder(agreed).encode(tensor)
    header = msgpack.unpackb(msgpack.packb(coded.header))
    assert header == coded.header
    back = codec.decoder(agreed).decode(mesh_codec.Encoded(header, coded.buffers))
    assert back.shape == tensor.shape
    assert coded.nbytes == sum(memoryview(b).nbytes for b in coded.buffers)
