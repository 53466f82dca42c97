"""What machines do is data: a phase and numbers with their unit, and words only for people."""

from __future__ import annotations

import pytest

from mesh_core.host.progress import THIS_MACHINE, Activity, Phase


@pytest.mark.parametrize(
    ("activity", "unit", "words"),
    [
        (Activity(THIS_MACHINE, Phase.CHECKING, 1, 2), "bytes", "this machine: checking weights"),
        (Activity("den", Phase.SENDING_LORA, 1, 2, "night"), "bytes", "den: sending LoRA night"),
        (
            Activity("", Phase.WAITING, 3, 120, "den fell silent."),
            "seconds",
            "den fell silent.: waiting for it to come back",
        ),
    ],
)
def test_numbers_have_a_unit_and_people_get_words(activity: Activity, unit: str, words: str) -> None:
    assert (activity.unit, activity.words) == (unit, words)


def test_a_worker_names_its_phases_over_the_wire() -> None:
    assert Activity.of_worker("den", "loading", 1, 2) == Activity("den", Phase.LOADING, 1, 2)
    assert Activity.of_worker("den", "checking weights", 0, 0).phase is Phase.CHECKING


@pytest.mark.parametrize("said", ["waiting for it to come back", "sending LoRA", "dancing", "x" * 1000])
def test_a_worker_can_neither_claim_to_be_lost_nor_flood_the_line(said: str) -> None:
    activity = Activity.of_worker("den", said, 1, 2)
    assert activity.phase is Phase.OTHER and activity.unit == "bytes"
    assert activity.words == f"den: {said[:100]}"
