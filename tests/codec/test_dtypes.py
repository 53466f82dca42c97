from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from mesh_codec import DTYPES, CodecUnsupported, from_name, from_safetensors, from_torch


@pytest.mark.parametrize("entry", DTYPES, ids=lambda d: d.name)
def test_every_entry_is_found_by_all_its_names(entry):
    assert from_name(entry.name) is from_safetensors(entry.safetensors) is from_torch(entry.torch) is entry
    assert entry.torch.itemsize == entry.itemsize
    assert str(entry.torch) == f"torch.{entry.name}"


@pytest.mark.parametrize("entry", DTYPES, ids=lambda d: d.name)
def test_safetensors_itself_uses_that_name(entry):
    assert f'"dtype":"{entry.safetensors}"'.encode() in save({"x": torch.zeros(2).to(entry.torch)})


def test_only_floats_that_activations_come_in_may_lose_anything():
    assert {d.name for d in DTYPES if d.lossy} == {"float16", "bfloat16", "float32"}


@pytest.mark.parametrize("find", [from_name, from_safetensors])
@pytest.mark.parametrize("name", ["float7", "", None, 5, ["bool"], "x" * 10_000])
def test_an_unknown_name_is_a_short_error_that_lists_the_known_ones(find, name):
    with pytest.raises(CodecUnsupported, match=r"bool|BOOL") as caught:
        find(name)
    assert len(str(caught.value)) < 400


def test_an_unknown_torch_type():
    with pytest.raises(CodecUnsupported, match="complex128"):
        from_torch(torch.complex128)
