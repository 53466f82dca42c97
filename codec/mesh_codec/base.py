"""The codec contract: tensors to buffers and back, one stream per (session, direction, tensor).

Knows no sockets, no models, no sessions. A payload is a small header of plain values plus buffers; anything per
channel or per token is a buffer, never a list in the header.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mesh_codec.qualities import Quality as Quality

Buffer = bytes | bytearray | memoryview

StreamMemory = Literal["none", "restored", "reset"]
"""What streams carry from one tensor to the next: nothing; something that `Encoder.restore` brings back exactly; or
something that is lost on the way back, so that a key frame follows."""


@dataclass(frozen=True)
class Encoded:
    """One coded tensor.

    Attributes:
        header: plain msgpack values (str, int, float, bool, bytes, None, lists and maps of them); small.
            Always holds ``dtype`` (a name of `mesh_codec.dtypes`) and ``shape`` (list of int).
        buffers: the payload. A raw buffer may be a view of the tensor's own memory: whoever sends it keeps
            ``owner`` alive until it is sent.
        owner: what the buffers are views of.
    """

    header: dict[str, Any]
    buffers: Sequence[Buffer]
    owner: object = None

    @property
    def nbytes(self) -> int:
        """Payload bytes, the header not counted."""
        return sum(memoryview(b).nbytes for b in self.buffers)


@dataclass(frozen=True)
class DecodeLimits:
    """What a decoder accepts before it allocates anything."""

    max_elements: int = 1 << 30
    max_bytes: int = 4 << 30
    max_dims: int = 8


class Encoder(ABC):
    """Encodes the tensors of one stream, in order."""

    @abstractmethod
    def encode(self, tensor: Tensor) -> Encoded:
        """``tensor`` of any shape and device; not modified.

        Raises:
            CodecUnsupported: a dtype that this codec cannot carry.
        """

    def reset(self) -> None:  # noqa: B027  (stateless codecs have nothing to forget)
        """Forget all references: the next tensor is coded as a key frame."""

    def state(self) -> object:
        """What `restore` needs to have the stream go on as from here, whatever is coded meanwhile: what is referred to
        does not change any more. Kept beside the stream for one step, so it is no copy. None where nothing is kept."""
        return None

    def restore(self, state: object) -> None:
        """Go back to where `state` of this stream was taken. Unless a codec does better, a key frame follows."""
        self.reset()


class Decoder(ABC):
    """Decodes the tensors of one stream, in the order in which they were encoded."""

    @abstractmethod
    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        """The tensor, of the header's dtype and shape, on ``device``. Its memory may be that of the buffers.

        Raises:
            CodecCorrupt: the payload is damaged, lies about its size or was made by something else.
            CodecStateLost: it needs a reference that this decoder does not have.
        """

    def reset(self) -> None:  # noqa: B027
        """Forget all references."""

    def state(self) -> object:
        """As `Encoder.state`."""
        return None

    def restore(self, state: object) -> None:
        """As `Encoder.restore`."""
        self.reset()


@dataclass(frozen=True)
class Estimate:
    """What a codec expects of its settings before anything was coded. Everything may be left out.

    Attributes:
        bits: per element of a model's hidden state, all included; None: tell by coding a sample.
        engine: what codes here with these settings, for example ``"nvcomp"``. Settings of one engine run at about the
            same speed. The other end is known by this name too.
        label: what people read, for example ``"entropy+temporal"``; the codec's name if empty.
    """

    bits: float | None = None
    engine: str = ""
    label: str = ""


class Codec(ABC):
    """A way to code tensors. Stateless; streams hold the state."""

    name: ClassVar[str]

    near: ClassVar[bool] = False
    """Whether it is only for processes of one user on one machine: payloads name things that mean nothing elsewhere,
    and that nobody else may reach. Whoever opens streams sees to it."""

    @abstractmethod
    def capabilities(self) -> dict[str, Any]:
        """Plain values that the other end needs to know (engines, formats); compared when ends negotiate.

        Lists are options and numbers are limits: where a third end chooses for two others, it gives `settings` the
        options that both have and the lower limits.
        """

    @abstractmethod
    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        """Plain settings for ``quality``, of `mesh_codec.qualities`, with an end of capabilities ``peer``.

        Raises:
            CodecUnsupported: this codec cannot give that quality, or shares no format with the peer.
        """

    def estimate(self, settings: Mapping[str, Any], dtype: torch.dtype) -> Estimate:
        """What ``settings`` will cost for tensors of ``dtype``; by default nothing is known beforehand."""
        return Estimate()

    def memory(self, settings: Mapping[str, Any]) -> StreamMemory:
        """What streams with these settings carry from one tensor to the next, at either end."""
        return "none"

    def remedies(self) -> Sequence[tuple[str, str]]:
        """What keeps this codec from what this machine's hardware could do: what is wrong, and what to do about it.
        Empty when nothing does. ``mesh doctor`` shows it."""
        return ()

    @abstractmethod
    def encoder(self, settings: Mapping[str, Any]) -> Encoder:
        """Open a stream for encoding.

        Raises:
            CodecUnsupported: a setting that is unknown here or out of range.
        """

    @abstractmethod
    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> Decoder:
        """Open a stream for decoding what an encoder with the same settings made."""


@dataclass(frozen=True)
class CodecChoice:
    """A codec by name with its settings: what two ends agree on for one tensor of one cut."""

    codec: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
