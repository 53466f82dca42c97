"""What the fields of messages are made of: bounded numbers and texts, and the maps with fixed keys. Knows no message.

Maps with fixed keys are plain dicts for whoever makes or reads a message; only the decoder sees what they must hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from msgspec import Meta

Uint = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
SessionId = Annotated[bytes, Meta(min_length=16, max_length=16)]
AnySession = Annotated[bytes, Meta(max_length=16)]
"""A session's id, or nothing."""

Hash = Annotated[str, Meta(min_length=64, max_length=64)]
PublicKey = Annotated[str, Meta(min_length=40, max_length=40)]
Label = Annotated[str, Meta(max_length=256)]
"""A name, for people or of a class."""

Versions = Annotated[list[Uint], Meta(min_length=1, max_length=16)]
"""Of the wire format."""

SpanEnds = Annotated[list[Uint], Meta(min_length=2, max_length=2)]
"""Start and stop."""

Plain = dict[str, Any]
"""A map of plain values: None, bool, int, finite float, str, bytes, lists and maps of them."""

if TYPE_CHECKING:
    TensorEntry = dict[str, Any]
    ConstantEntry = dict[str, Any]
    LoraUse = dict[str, Any]
    NextWorker = dict[str, Any]
    CodecsByTensor = dict[str, dict[str, Any]]
else:

    class TensorEntry(TypedDict):
        """One coded tensor: name, codec, settings, the codec's header, number of buffers; buffers follow in order."""

        n: str
        c: str
        s: Plain
        h: Plain
        k: Uint

    class ConstantEntry(TensorEntry):
        """A tensor entry and the hash that names its content."""

        hash: str

    class LoraUse(TypedDict):
        """A LoRA and its strengths: hash of what it does to the span, hash of the same without its tensors' content,
        a name. Without hashes, the one of the worker's own LoRAs that has the name."""

        id: Annotated[str, Meta(max_length=64)]
        outline: Annotated[str, Meta(max_length=64)]
        name: str
        strength: float
        base: float

    class NextWorker(TypedDict):
        """Who continues after this worker, and the session there."""

        address: str
        server_key: str
        session: SessionId

    class CodecChoiceEntry(TypedDict):
        """Codec and settings of a tensor."""

        codec: str
        settings: Plain

    CodecsByTensor = dict[str, CodecChoiceEntry]
