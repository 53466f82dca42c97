"""Facts of one checkpoint, and what crosses its cuts: plain data that adapters make and the core works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from mesh_codec.dtypes import from_safetensors
from mesh_core.model.spans import BlockSpan

State = dict[str, Tensor]
"""The tensors that change from block to block and cross a cut, by name."""

Role = Literal["hidden", "fine", "latent", "prediction", "exact"]
"""What a state tensor is, for whoever chooses its codec.

``hidden``: residual stream, large, may be coded with loss. ``fine``: another one, of few bytes beside it, which is
coded with a codec of its own and never with more loss than quality ``transparent`` has: a sound beside a video.
``latent``: the model's input. ``prediction``: its output. ``exact``: small, never coded with loss.
"""


@dataclass(frozen=True)
class Piece:
    """Rows ``start:stop`` (along dimension 0) of a tensor in a checkpoint file; the whole tensor if stop is None."""

    tensor: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class ParameterSpec:
    """Where one parameter, or persistent buffer, of the model comes from, and which blocks need it.

    Attributes:
        shape: of the parameter in the model.
        dtype: in the file, as safetensors names it (``"BF16"``, ``"F32"``, ``"F16"``; whole numbers are never cast);
            of a stored weight its label, see `mesh_core.model.stored.StoredTensor`.
        pieces: rows of file tensors, concatenated along dimension 0, that make the parameter.
        scope: the blocks that need the parameter. A block's own parameters: that block. Input layers: ``0:1``.
            Output layers: the last block. Shared modulation: all blocks that use it.
        stored_bytes: that it takes where it stays as it is stored; None where it is cast to the type of the stage.
        transient: bytes that computing with it needs for the moment, where it stays as it is stored; for numbers of two
            bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    scope: BlockSpan
    stored_bytes: int | None = None
    transient: int = 0

    @property
    def in_a_format(self) -> bool:
        """Whether the file holds it in a format (`mesh_core.model.stored`) and not as its numbers."""
        return "/" in self.dtype

    def nbytes(self, itemsize: int) -> int:
        """Bytes that it takes in the memory of a stage; ``itemsize`` is that of the type that the stage computes in."""
        return self.elements * itemsize if self.stored_bytes is None else self.stored_bytes

    @property
    def whole_numbers(self) -> torch.dtype | None:
        """Its type if it holds no fractions: such a buffer keeps it, whatever the stage computes in."""
        found = None if self.in_a_format else from_safetensors(self.dtype).torch
        return None if found is None or found.is_floating_point else found

    @property
    def elements(self) -> int:
        """Numbers that the parameter holds."""
        return prod(self.shape)


@dataclass(frozen=True)
class ModelSpec:
    """Everything the core needs to know of one checkpoint, found from its header alone.

    Attributes:
        family: of the adapter that recognised it.
        variant: for people, for example ``"9b"``.
        config: the arguments of the model class; plain data.
        block_kinds: one word per block in execution order (``"double"``, ``"single"``); their number is N.
        states: N + 1 mappings: names and roles of the state at cut 0 (the model's input) to cut N (its output).
        constants: names of the tensors that are constant for a generation, and the blocks that need them.
        parameters: every parameter and persistent buffer of the model by its name in the model class. Names are those
            of diffusers, whatever the file calls them, so two layouts of the same weights are the same model.
        defaults: arguments of the pipeline's call that the model's authors recommend.
        optional: names of state tensors and constants that may be missing, as an argument of forward() may be.
        invisible: arguments of the model class that change what it computes and show in no parameter's name or shape
            (a base of rotary frequencies, a number of heads); plain data. Part of the model's identity.
    """

    family: str
    variant: str
    config: Mapping[str, Any]
    block_kinds: tuple[str, ...]
    states: tuple[Mapping[str, Role], ...]
    constants: Mapping[str, BlockSpan]
    parameters: Mapping[str, ParameterSpec]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    invisible: Mapping[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """N, the number of blocks."""
        return len(self.block_kinds)

    def span(self, text: str) -> BlockSpan:
        """``text`` as a span of this model; see `BlockSpan.parse`."""
        return BlockSpan.parse(text, self.blocks)

    def parameters_of(self, span: BlockSpan) -> dict[str, ParameterSpec]:
        """The parameters that a stage of ``span`` needs; none for an empty span."""
        return {name: p for name, p in self.parameters.items() if p.scope.overlaps(span)}

    def constants_of(self, span: BlockSpan) -> tuple[str, ...]:
        """Names of the generation constants that a stage of ``span`` needs."""
        return tuple(name for name, scope in self.constants.items() if scope.overlaps(span))

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that occur among the parameters, as safetensors names them, sorted."""
        return tuple(sorted({p.dtype for p in self.parameters.values()}))


@dataclass
class Conditioning:
    """What blocks need besides the state.

    Attributes:
        constants: constant for a generation (ids, masks, text). Each crosses once, named by the hash of its
            whole content.
        options: small plain values (None, bool, int, float, str, or lists of them) that change how blocks compute.
            They cross with every step; a stage must not trust them, since they come over the network.
    """

    constants: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
