"""One finding of ``mesh doctor``. Knows nothing of what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from mesh_core.errors import MeshError

Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        subject: what was checked: ``"this machine"``, or a worker's address.
        name: the part of it, one or two words.
        detail: what was found.
        hint: what to do about it; empty when all is well.
    """

    subject: str
    name: str
    status: Verdict
    detail: str
    hint: str = ""


def failed(subject: str, name: str, error: MeshError) -> Finding:
    """An error of the mesh as what a check found."""
    return Finding(subject, name, "FAIL", error.message, error.hint)


def guarded(subject: str, name: str, find: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What ``find`` yields, and an error of the mesh as a failed check."""
    try:
        yield from find()
    except MeshError as error:
        yield failed(subject, name, error)
