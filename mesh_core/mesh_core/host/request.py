"""One step as the host program asks for it, with everything in it named by its content. Knows no workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh_codec.base import Encoded
from mesh_core.crossing.constants import ConstantsBook
from mesh_core.crossing.sequences import Sequences
from mesh_core.model.spec import Conditioning, Role, State

_MOST_MOMENT = 1 << 20
"""Bytes of an exact tensor up to which it tells the steps of a generation apart."""


@dataclass(frozen=True)
class Request:
    """Attributes:
    constants: hash of each constant, and its encoding where it was just made.
    sequence: full name of the codec streams that the step belongs to.
    """

    state: State
    conditioning: Conditioning
    constants: Mapping[str, tuple[str, Encoded | None]]
    sequence: str


class Requests:
    """Makes the requests of one session.

    Args:
        roles: of the tensors of the state at the first remote cut.

    Attributes:
        sequences: that the session's steps belong to.
    """

    def __init__(self, book: ConstantsBook, roles: Mapping[str, Role]) -> None:
        self._book, self._roles = book, roles
        self.sequences = Sequences()

    def new(self, state: State, conditioning: Conditioning, sequence: str) -> Request:
        """``sequence``: the host program's own name for the pass."""
        exact = [tensor for name, tensor in sorted(state.items()) if self._roles.get(name) == "exact"]
        constants = self._book.names(conditioning.constants)
        digests = {name: digest for name, (digest, _) in constants.items()}
        moment = " ".join(self._book.name(t, lasting=False)[0] for t in exact if t.nbytes <= _MOST_MOMENT)
        return Request(state, conditioning, constants, self.sequences.name(sequence, digests, moment))
