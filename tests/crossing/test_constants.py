"""Names of constants: by their whole content, and remembered only while that cannot have changed."""

from __future__ import annotations

import json

import pytest
import torch
from blake3 import blake3

from mesh_codec import RawCodec
from mesh_core.crossing.constants import ConstantsBook, digest
from mesh_core.errors import ConstantsMissing, WireTooLarge
from mesh_core.worker.constants import ConstantsCache

SMALL, LARGE = 1, 300_000
"""Elements of float32 tensors, one of which is hashed in several threads."""


@pytest.fixture
def book() -> ConstantsBook:
    return ConstantsBook(RawCodec())


def test_every_element_counts(book: ConstantsBook) -> None:
    tensor = torch.zeros(LARGE)
    names = {book.name(tensor.clone())[0]}
    for position in (0, 1, 12_345, LARGE - 1):
        other = tensor.clone()
        other[position] = 1e-30
        names.add(book.name(other)[0])
    assert len(names) == 5


def test_shape_and_type_count_equal_content_does_not(book: ConstantsBook) -> None:
    tensor = torch.zeros(6)
    assert book.name(tensor)[0] == book.name(torch.zeros(6))[0]
    others = [tensor.reshape(2, 3), tensor.int(), torch.zeros(3, dtype=torch.float64), torch.zeros(5)]
    assert len({book.name(t)[0] for t in [tensor, *others]}) == 5


@pytest.mark.parametrize("elements", [0, SMALL, LARGE])
def test_a_name_is_the_hash_of_type_shape_and_bytes(book: ConstantsBook, elements: int) -> None:
    tensor = torch.randn(elements, 2).to(torch.float16)
    form = json.dumps(["float16", [elements, 2]]).encode()
    assert book.name(tensor)[0] == blake3(form + tensor.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_a_tensor_passed_again_is_not_hashed_again(book: ConstantsBook, elements: int) -> None:
    tensor = torch.randn(elements)
    name, coded = book.name(tensor)
    assert coded is not None and name == digest(coded)
    assert book.name(tensor) == (name, None)


@pytest.mark.parametrize("elements", [20, LARGE])
@pytest.mark.parametrize("through", ["itself", "a view", "an index", "copy_"])
def test_a_change_in_place_is_noticed(book: ConstantsBook, through: str, elements: int) -> None:
    tensor = torch.zeros(elements)
    before, _ = book.name(tensor)
    if through == "itself":
        tensor.add_(1)
    elif through == "a view":
        tensor[10:20].mul_(0).add_(2)
    elif through == "an index":
        tensor[7] = 3
    else:
        tensor.copy_(torch.ones(elements))
    after, coded = book.name(tensor)
    assert after != before and coded is not None


def test_no_tensor_of_the_host_is_kept_alive_and_a_new_tensor_in_the_same_place_is_another(book: ConstantsBook) -> None:
    names = set()
    for value in range(5):
        tensor = torch.full((LARGE,), float(value))
        names.add(book.name(tensor)[0])
        del tensor
    assert len(names) == 5 and not book._known


def cache(limit: int) -> ConstantsCache:
    return ConstantsCache(torch.device("cpu"), limit)


def test_the_least_recently_used_constant_goes_first() -> None:
    held = cache(20_000)
    for name in "abc":
        held.put(name, torch.zeros(1000))  # 4 kB each, and as much around it: the third pushes the first out
    with pytest.raises(ConstantsMissing, match="text"):
        held.get({"text": "a"})
    held.get({"text": "b"})
    held.put("d", torch.zeros(1000))
    assert set(held.get({"text": "b", "ids": "d"})) == {"text", "ids"}
    assert 8000 < held.nbytes <= 20_000


def test_a_constant_over_the_whole_cache_is_refused_with_the_setting_to_change() -> None:
    with pytest.raises(WireTooLarge) as caught:
        cache(5000).put("a", torch.zeros(1000))
    assert "constants_cache" in caught.value.hint


def test_constants_without_elements_are_limited_in_number() -> None:
    held = cache(1 << 20)
    for number in range(100_000):
        held.put(str(number), torch.zeros(0))
    with pytest.raises(ConstantsMissing):
        held.get({"text": "0"})
    assert held.get({"text": "99999"})
    assert held.nbytes <= 1 << 20


def test_the_member_that_takes_most_gives_way() -> None:
    held = cache(1 << 20)
    held.put("mine", torch.zeros(50_000), "modest")
    for number in range(200):
        held.put(str(number), torch.zeros(number * 100), "greedy")
    assert held.get({"text": "mine"})["text"].nbytes == 200_000
    with pytest.raises(ConstantsMissing):
        held.get({"text": "0"})


def test_a_constant_that_two_members_send_is_held_and_counted_once() -> None:
    held = cache(1 << 20)
    for owner in ("one", "other"):
        held.put("shared", torch.zeros(1000), owner)
    once = held.nbytes
    held.put("shared", torch.zeros(1000), "one")
    assert held.nbytes == once < 10_000
