"""The messages between hosts and workers: one frozen dataclass per type, named as on the wire in lower case.

The annotations are the format: `mesh_core.wire.schema` checks what arrives against them, and
docs/reference/wire-format.md describes them. Knows no sockets, no tensors, no sessions' meaning.

A message and its answers carry the same ``id``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from mesh_core.wire.limits import PROBE_BYTES
from mesh_core.wire.schema import Count, Keys, Length, Range, Size

Uint = Annotated[int, Range(0, (1 << 63) - 1)]
SessionId = Annotated[bytes, Length(16, 16)]
Plain = dict[str, Any]
"""A map of plain values: None, bool, int, finite float, str, bytes, lists and maps of them."""

CodecChoices = dict[str, Annotated[Plain, Keys(codec=str, settings=Plain)]]
"""Tensor name -> codec and settings."""

TensorEntry = Annotated[Plain, Keys(n=str, c=str, s=Plain, h=Plain, k=Uint)]
"""One coded tensor: name, codec, settings, the codec's header, number of buffers; buffers follow in order."""

ConstantEntry = Annotated[Plain, Keys(hash=str, n=str, c=str, s=Plain, h=Plain, k=Uint)]
"""A tensor entry and the hash that names its content."""

Hash = Annotated[str, Length(64, 64)]

LoraUse = Annotated[
    Plain,
    Keys(id=Annotated[str, Length(0, 64)], outline=Annotated[str, Length(0, 64)], name=str, strength=float, base=float),
]
"""A LoRA and its strengths: hash of what it does to the span, hash of the same without its tensors' content, a name.
Without hashes, the one of the worker's own LoRAs that has the name."""

NextWorker = Annotated[Plain, Keys(address=str, server_key=str, session=SessionId)]
"""Who continues after this worker, and the session there."""


@dataclass(frozen=True)
class Message:
    """Base of all messages. ``id`` is chosen by who asks and repeated in every answer."""

    id: Uint


@dataclass(frozen=True)
class Hello(Message):
    """Host to worker, first on every connection: who I am and the wire versions that I speak."""

    wire: list[int]
    package: str
    plugins: dict[str, str]
    name: str


@dataclass(frozen=True)
class Welcome(Message):
    """Answer to `Hello`. ``client_key``: under which this worker connects to neighbours; "" if it has none."""

    wire: int
    package: str
    plugins: dict[str, str]
    name: str
    client_key: str
    codecs: dict[str, Plain]
    devices: list[Plain]
    adapters: dict[str, str]


@dataclass(frozen=True)
class Enrol(Message):
    """Host to worker over an invite's key: make this key of mine a member. Answered by `Enrolled`."""

    key: Annotated[str, Length(40, 40)]
    name: Annotated[str, Length(0, 256)]


@dataclass(frozen=True)
class Enrolled(Message):
    """The key is a member from now on; the invite is used up. ``name`` is the worker's."""

    name: str


@dataclass(frozen=True)
class Catalogue(Message):
    """Host to worker: which checkpoints do you have? Answered by `Catalogued`."""


@dataclass(frozen=True)
class Catalogued(Message):
    """The checkpoints that the worker recognised."""

    checkpoints: list[Plain]


@dataclass(frozen=True)
class Open(Message):
    """Host to worker: hold this span ready. Answered by any number of `Progress`, then `Opened` or `Failed`.

    An open session that is opened again changes its span; only the difference is loaded.
    """

    session: SessionId
    family: str
    structure: str
    fingerprint: str
    span: Annotated[list[Uint], Count(2, 2)]
    dtype: str
    loras: list[LoraUse]
    inputs: CodecChoices
    outputs: CodecChoices
    next: NextWorker | None
    options: Plain


@dataclass(frozen=True)
class Progress(Message):
    """How far the request of the same id has come; ``total`` is 0 while it is not known."""

    phase: str
    done: Uint
    total: Uint


@dataclass(frozen=True)
class Opened(Message):
    """The session is ready for steps."""

    info: Plain


@dataclass(frozen=True)
class Admit(Message):
    """Host to worker: the neighbour with this key may hand over states for the session. Answered by `Ok`."""

    session: SessionId
    key: str


@dataclass(frozen=True)
class Ok(Message):
    """Done; there is nothing else to say."""


@dataclass(frozen=True)
class Constants(Message):
    """Host to worker: tensors that are constant for a generation, each named by its hash. Answered by `Ok`."""

    session: SessionId
    tensors: list[ConstantEntry]


@dataclass(frozen=True)
class Step(Message):
    """Host to worker, or worker to the next one: run your span on this state. Answered by `Result` to the host.

    ``attempt`` counts re-sendings of a step. ``sequence`` names the codec streams (one per kind of pass).
    ``constants`` maps names to hashes. ``trace`` holds what the workers before this one report.
    """

    session: SessionId
    step: Uint
    attempt: Uint
    sequence: str
    constants: dict[str, str]
    options: Plain
    tensors: list[TensorEntry]
    trace: list[Plain]
    deadline_ms: Uint


@dataclass(frozen=True)
class Result(Message):
    """The state after the last span of a chain, sent by each worker to whoever opened its session."""

    session: SessionId
    step: Uint
    attempt: Uint
    tensors: list[TensorEntry]
    trace: list[Plain]


@dataclass(frozen=True)
class Failed(Message):
    """The request of the same id failed. ``session`` may be empty, ``error`` is a class name, texts are bounded."""

    session: Annotated[bytes, Length(0, 16)]
    step: int
    error: Annotated[str, Length(0, 256)]
    message: str
    hint: str
    worker: str
    traceback: str


@dataclass(frozen=True)
class Cancel(Message):
    """Host to worker: stop this step; nobody waits for it. Not answered."""

    session: SessionId
    step: Uint


@dataclass(frozen=True)
class Close(Message):
    """Host to worker: forget the session. Not answered."""

    session: SessionId


@dataclass(frozen=True)
class Ping(Message):
    """Are you there, and do you hold this session, if one is named? Answered at once, also while a step runs, by
    `Pong`, or by `Failed` (SessionUnknown) when a restart made the worker forget it. A host sends pings over a second
    connection, on which no large message keeps them waiting."""

    session: Annotated[bytes, Length(0, 16)]


@dataclass(frozen=True)
class Pong(Message):
    """Yes."""


@dataclass(frozen=True)
class Probe(Message):
    """To a worker, to measure the link: answer with one buffer of ``size`` bytes. May carry a buffer of its own, which
    is dropped. A neighbour asks for nothing back: states go one way."""

    size: Annotated[int, Size(PROBE_BYTES)]


@dataclass(frozen=True)
class Probed(Message):
    """Answer to `Probe`."""


@dataclass(frozen=True)
class Shelf(Message):
    """Host to worker: which LoRAs do you have? Answered by `Shelved`."""


@dataclass(frozen=True)
class Shelved(Message):
    """The worker's LoRAs: those of its user's folders, and those that it received."""

    loras: list[Plain]


@dataclass(frozen=True)
class Discard(Message):
    """Host to worker: forget this LoRA, which was sent to you. Answered by `Ok`."""

    lora: Hash


@dataclass(frozen=True)
class Seek(Message):
    """Host to worker: which of these do you have, for this span of that model? Answered by `Sought`."""

    family: str
    structure: str
    span: Annotated[list[Uint], Count(2, 2)]
    loras: list[LoraUse]


@dataclass(frozen=True)
class Sought(Message):
    """Places in the list that was asked about, of those that are here."""

    held: list[Uint]


@dataclass(frozen=True)
class Offer(Message):
    """Host to worker: I am going to send this LoRA, a file of ``size`` bytes. Answered by `Offered`.

    ``lora`` is the hash of what it does, ``digest`` that of the file's bytes.
    """

    lora: Hash
    digest: Hash
    size: Uint
    family: str
    structure: str
    name: Annotated[str, Length(0, 256)]


@dataclass(frozen=True)
class Offered(Message):
    """How many bytes of the file are here; all of them when it was verified and is kept."""

    have: Uint


@dataclass(frozen=True)
class Chunk(Message):
    """Host to worker: one buffer, the bytes from ``offset`` of a file that was offered. Answered by `Offered`."""

    lora: Hash
    offset: Uint


@dataclass(frozen=True)
class Adjust(Message):
    """Host to worker: from now on, the session has these LoRAs. Answered by any number of `Progress`, then `Opened`
    or `Failed`; after a failure it has those that it had."""

    session: SessionId
    loras: list[LoraUse]


_ALL: tuple[type[Message], ...] = (
    Hello,
    Welcome,
    Enrol,
    Enrolled,
    Catalogue,
    Catalogued,
    Open,
    Progress,
    Opened,
    Admit,
    Ok,
    Constants,
    Step,
    Result,
    Failed,
    Cancel,
    Close,
    Ping,
    Pong,
    Probe,
    Probed,
    Shelf,
    Shelved,
    Discard,
    Seek,
    Sought,
    Offer,
    Offered,
    Chunk,
    Adjust,
)

MESSAGES: Mapping[str, type[Message]] = {kind.__name__.lower(): kind for kind in _ALL}
"""Every message class by its type name on the wire."""
