from __future__ import annotations

import ast
import inspect

import msgpack
import pluggy
import pytest
import torch

import mesh_codec
from mesh_codec import plugin


def test_all_is_exactly_what_is_visible():
    assert dir(mesh_codec) == sorted(mesh_codec.__all__)
    for name in mesh_codec.__all__:
        assert getattr(mesh_codec, name) is not None, name
    with pytest.raises(AttributeError, match="nothing"):
        mesh_codec.nothing  # noqa: B018


def test_the_names_for_type_checkers_are_those_that_are_resolved():
    tree = ast.parse(inspect.getsource(mesh_codec))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    listed = {name: f"mesh_codec.{module}" for module, names in mesh_codec._NAMES.items() for name in names}
    assert imported == listed and set(listed) == set(mesh_codec.__all__)


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
