"""One finding of ``mesh doctor``. Knows nothing of what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from mesh_core.errors import MeshError

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Check:
    """Attributes:
    subject: what was checked: ``"this machine"``, or a worker's address.
    name: the part of it, one or two words.
    detail: what was found.
    hint: what to do about it; empty when all is well.
    """

    subject: str
    name: str
    status: Status
    detail: str
    hint: str = ""


def failed(subject: str, name: str, error: MeshError) -> Check:
    return Check(subject, name, "FAIL", error.message, error.hint)


def guarded(subject: str, name: str, find: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """What ``find`` yields, and an error of the mesh as a failed check."""
    try:
        yield from find()
    except MeshError as error:
        yield failed(subject, name, error)
