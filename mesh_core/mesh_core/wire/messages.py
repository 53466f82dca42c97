"""The messages between hosts and workers: one frozen class per type, named as on the wire in lower case unless a
``tag`` says otherwise.

The annotations are the format: what arrives is decoded by them, and docs/reference/wire-format.md describes them.
A class is built without checks; packing it checks. Knows no sockets, no tensors, no sessions' meaning.

A message and its answers carry the same ``id``.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from mesh_core.wire.entries import (
    AnySession,
    CodecsByTensor,
    ConstantEntry,
    Hash,
    Label,
    LoraUse,
    NextWorker,
    Plain,
    PublicKey,
    SessionId,
    SpanEnds,
    TensorEntry,
    Uint,
    Versions,
)


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag_field="t", tag=str.lower):
    """Base of all messages. ``id`` is chosen by who asks and repeated in every answer."""

    id: Uint


class Hello(Message, frozen=True):
    """Host to worker, first on every connection: who I am and the wire versions that I speak."""

    wire: Versions
    package: str
    plugins: dict[str, str]
    name: str


class Welcome(Message, frozen=True):
    """Answer to `Hello`. ``client_key``: under which this worker connects to neighbours; "" if it has none."""

    wire: Uint
    package: str
    plugins: dict[str, str]
    name: str
    client_key: str
    codecs: dict[str, Plain]
    devices: list[Plain]
    adapters: dict[str, str]


class Enrol(Message, frozen=True):
    """Host to worker over an invite's key: make this key of mine a member. Answered by `Enrolled`."""

    key: PublicKey
    name: Label


class Enrolled(Message, frozen=True):
    """The key is a member from now on; the invite is used up. ``name`` is the worker's."""

    name: str


class Catalogue(Message, frozen=True):
    """Host to worker: which checkpoints do you have? Answered by `Catalogued`."""


class Catalogued(Message, frozen=True):
    """The checkpoints that the worker recognised."""

    checkpoints: list[Plain]


class Open(Message, frozen=True):
    """Host to worker: hold this span ready. Answered by any number of `Progress`, then `Opened` or `Failed`.

    An open session that is opened again changes its span; only the difference is loaded.

    ``dtype`` is that of the state and of all parameters but ``others``, of which the type is said there by name.
    ``arithmetic``: how weights are computed with that are not stored as their numbers, by how they are stored.
    ``computed``: by name, the hash of each tensor of the model that no checkpoint holds; None for those that its class
    computes when it is loaded in ``dtype``.
    """

    session: SessionId
    family: str
    structure: str
    fingerprint: str
    span: SpanEnds
    dtype: str
    others: dict[Label, str]
    arithmetic: dict[Label, Label]
    computed: dict[Label, Hash] | None
    loras: list[LoraUse]
    inputs: CodecsByTensor
    outputs: CodecsByTensor
    next: NextWorker | None
    options: Plain


class Progress(Message, frozen=True):
    """How far the request of the same id has come; ``total`` is 0 while it is not known."""

    phase: str
    done: Uint
    total: Uint


class Opened(Message, frozen=True):
    """The session is ready for steps."""

    info: Plain


class Admit(Message, frozen=True):
    """Host to worker: the neighbour with this key may hand over states for the session. Answered by `Ok`."""

    session: SessionId
    key: str


class Ok(Message, frozen=True):
    """Done; there is nothing else to say."""


class Constants(Message, frozen=True):
    """Host to worker: tensors that are constant for a generation, each named by its hash. Answered by `Ok`."""

    session: SessionId
    tensors: list[ConstantEntry]


class Step(Message, frozen=True):
    """Host to worker, or worker to the next one: run your span on this state. Answered by `Result` to the host.

    ``attempt`` is raised whenever a step is sent again or given up: a worker refuses what comes late.
    ``after`` is the step whose tensors this one is predicted from; 0: it starts at key frames.
    ``sequence`` names the codec streams (one per kind of pass).
    ``constants`` maps names to hashes. ``trace`` holds what the workers before this one report.
    """

    session: SessionId
    step: Uint
    attempt: Uint
    after: Uint
    sequence: str
    constants: dict[str, str]
    options: Plain
    tensors: list[TensorEntry]
    trace: list[Plain]
    deadline_ms: Uint


class Result(Message, frozen=True):
    """The state after the last span of a chain, sent by each worker to whoever opened its session."""

    session: SessionId
    step: Uint
    attempt: Uint
    tensors: list[TensorEntry]
    trace: list[Plain]


class Failed(Message, frozen=True):
    """The request of the same id failed. ``session`` may be empty, ``error`` is a class name, texts are bounded."""

    session: AnySession
    step: int
    error: Label
    message: str
    hint: str
    worker: str
    traceback: str


class Cancel(Message, frozen=True):
    """Host to worker: stop this step; nobody waits for it. Not answered."""

    session: SessionId
    step: Uint


class Close(Message, frozen=True):
    """Host to worker: forget the session. Not answered."""

    session: SessionId


class Ping(Message, frozen=True):
    """Are you there, and do you hold this session, if one is named? Answered at once, also while a step runs, by
    `Pong`, or by `Failed` (SessionUnknown) when a restart made the worker forget it. A host sends pings over a second
    connection, on which no large message keeps them waiting."""

    session: AnySession


class Pong(Message, frozen=True):
    """Yes."""


class Probe(Message, frozen=True):
    """To a worker, to measure the link: answer with one buffer of ``size`` bytes. May carry a buffer of its own, which
    is dropped. A neighbour asks for nothing back: states go one way."""

    size: Uint


class Probed(Message, frozen=True):
    """Answer to `Probe`."""


class ListLoras(Message, frozen=True, tag="shelf"):
    """Host to worker: which LoRAs do you have? Answered by `LorasListed`."""


class LorasListed(Message, frozen=True, tag="shelved"):
    """The worker's LoRAs: those of its user's folders, and those that it received."""

    loras: list[Plain]


class Discard(Message, frozen=True):
    """Host to worker: forget this LoRA, which was sent to you. Answered by `Ok`."""

    lora: Hash


class Seek(Message, frozen=True):
    """Host to worker: which of these do you have, for this span of that model? Answered by `Sought`."""

    family: str
    structure: str
    span: SpanEnds
    loras: list[LoraUse]


class Sought(Message, frozen=True):
    """Places in the list that was asked about, of those that are here."""

    held: list[Uint]


class Offer(Message, frozen=True):
    """Host to worker: I am going to send this LoRA, a file of ``size`` bytes. Answered by `Offered`.

    ``lora`` is the hash of what it does, ``digest`` that of the file's bytes.
    """

    lora: Hash
    digest: Hash
    size: Uint
    family: str
    structure: str
    name: Label


class Offered(Message, frozen=True):
    """How many bytes of the file are here; all of them when it was verified and is kept."""

    have: Uint


class Chunk(Message, frozen=True):
    """Host to worker: one buffer, the bytes from ``offset`` of a file that was offered. Answered by `Offered`."""

    lora: Hash
    offset: Uint


class Adjust(Message, frozen=True):
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
    ListLoras,
    LorasListed,
    Discard,
    Seek,
    Sought,
    Offer,
    Offered,
    Chunk,
    Adjust,
)


def type_name(kind: type[Message]) -> str:
    """What a message class is called on the wire."""
    return str(kind.__struct_config__.tag)


MESSAGES: Mapping[str, type[Message]] = {type_name(kind): kind for kind in _ALL}
"""Every message class by its type name on the wire."""
