"""Constants that carry no version: recognised by every bit of their content, with bounded memory that is given back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mesh_codec import RawCodec
from mesh_core.crossing import constants
from mesh_core.crossing.constants import ConstantsBook
from mesh_core.crossing.copies import Copies
from mesh_core.crossing.sequences import MOST_SEQUENCES
from mesh_core.host.request import Requests
from mesh_core.model.spec import Conditioning

WORDS = 40_000
"""Elements of float32 tensors that are large enough to be compared."""


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each tensor that is hashed."""
    sizes: list[int] = []
    digest = constants.digest
    monkeypatch.setattr(constants, "digest", lambda coded: (sizes.append(coded.nbytes), digest(coded))[1])
    return sizes


def book(copied: int = 1 << 20) -> ConstantsBook:
    return ConstantsBook(RawCodec(), copied)


def name(of: ConstantsBook, tensor: Tensor) -> str:
    return of.names({"text": tensor})["text"][0]


@pytest.mark.parametrize("anew", [False, True])
def test_interleaved_passes_are_hashed_once_each(hashed: list[int], anew: bool) -> None:
    passes, known = [torch.randn(WORDS), torch.randn(WORDS)], book()
    names = [[name(known, text.clone() if anew else text) for text in passes] for _ in range(12)]
    assert hashed == [4 * WORDS] * 2
    assert names[0] == [name(book(), text) for text in passes] and all(n == names[0] for n in names)


def test_the_steps_of_a_session_compare_constants_and_leave_the_moment_alone(hashed: list[int]) -> None:
    known = book()
    requests = Requests(known, {"hidden_states": "hidden", "times": "exact"})
    text = torch.randn(WORDS)
    for _ in range(5):
        state = {"hidden_states": torch.randn(WORDS), "times": torch.randn(WORDS)}
        requests.new(state, Conditioning({"text": text.clone()}), "")
    assert len(hashed) == 1 + 5, "the text once, the moment at every step"
    assert known._copies.nbytes == text.nbytes


def test_a_tensor_made_anew_outside_of_inference_mode_is_recognised_too(hashed: list[int]) -> None:
    text, known = torch.randn(WORDS), book()
    with torch.inference_mode(mode=False):
        assert len({name(known, torch.empty(WORDS).copy_(text)) for _ in range(3)}) == 1
    assert len(hashed) == 1


@pytest.mark.parametrize("position", [0, 1, 12_345, WORDS - 1])
@pytest.mark.parametrize("back", [False, True])
def test_a_change_in_place_of_any_element_is_noticed(position: int, back: bool) -> None:
    text, known = torch.zeros(WORDS), book()
    before = name(known, text)
    text[position] = 1e-45
    assert name(known, text) == name(book(), text) != before
    if back:
        text[position] = 0
        assert name(known, text) == before


def test_bits_count_not_values(hashed: list[int]) -> None:
    known = book()
    assert name(known, torch.zeros(WORDS)) != name(known, -torch.zeros(WORDS))
    nan = torch.full((WORDS,), torch.nan)
    assert name(known, nan) == name(known, nan.clone())
    other = nan.clone()
    other.view(torch.int32)[7] ^= 1
    assert other.isnan().all() and name(known, other) != name(known, nan)
    assert len(hashed) == 4


def test_another_form_of_the_same_bytes_is_another_constant() -> None:
    text, known = torch.zeros(WORDS), book()
    forms = [text, text.reshape(2, -1), text.view(torch.int32), text.view(torch.float16)]
    assert len({name(known, form) for form in forms}) == 4


@pytest.mark.parametrize(
    "arranged",
    [
        lambda t: t.reshape(200, -1).t(),
        lambda t: t[:200].expand(200, 200),
        lambda t: t.view(torch.uint8)[3:],
        lambda t: t.view(torch.float16)[1:],
        lambda t: torch.view_as_complex(t.reshape(-1, 2)).conj(),
    ],
    ids=["transposed", "expanded", "at an odd address", "at half a word", "conjugated"],
)
def test_any_arrangement_in_memory_is_recognised_and_named_by_content(hashed: list[int], arranged: object) -> None:
    text, known = torch.randn(WORDS), book()
    tensor: Tensor = arranged(text)  # type: ignore[operator]
    assert name(known, tensor) == name(known, tensor.resolve_conj().contiguous().clone())
    assert len(hashed) == 1
    before = name(known, tensor)
    text.view(torch.int32)[100] ^= -1
    assert name(known, tensor) == name(book(), tensor) != before


def test_small_constants_are_hashed_and_not_copied(hashed: list[int]) -> None:
    known, ids = book(), torch.zeros(512, 4)
    assert name(known, ids) == name(known, ids)
    assert len(hashed) == 2 and known._copies.nbytes == 0


def test_memory_is_bounded_and_what_is_in_use_stays(hashed: list[int]) -> None:
    known = book(copied=2 * 4 * WORDS)
    passes = [torch.randn(WORDS) for _ in range(3)]
    for _ in range(4):
        for text in passes:
            name(known, text)
            assert known._copies.nbytes <= 2 * 4 * WORDS
    assert len(hashed) == 2 + 4, "two passes once each, the one without room at every step"


def test_what_no_step_asks_for_is_dropped_and_makes_room() -> None:
    known = book(copied=4 * WORDS)
    old, new = torch.randn(WORDS), torch.randn(WORDS)
    name(known, old)
    for _ in range(MOST_SEQUENCES):
        assert known._copies.find(new) is None
        name(known, new)
    name(known, new)
    assert known._copies.find(old) is None and known._copies.find(new) is not None


def test_a_device_without_room_for_a_copy_costs_a_hash_and_no_step(
    hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensor: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(f"{tensor.nbytes} bytes more")

    text, known = torch.randn(WORDS), book()
    monkeypatch.setattr(Tensor, "clone", full)
    assert name(known, text) == name(known, text)
    assert len(hashed) == 2 and known._copies.nbytes == 0


def test_copies_are_the_sessions_own_and_given_back() -> None:
    copies, text = Copies(1 << 20), torch.randn(WORDS)
    copies.keep(text, "label")
    kept = text.clone()
    text.zero_()
    assert copies.find(kept) == "label" and copies.find(text) is None
    copies.clear()
    assert copies.nbytes == 0 and copies.find(kept) is None
