"""Every error that the mesh raises on purpose.

MeshError
├── ConfigError                 a setting, an option or a file of settings
├── PluginError
│   ├── PluginNotFound          nothing installed answers to that name
│   ├── PluginConflict          two distributions claim one name
│   ├── PluginIncompatible      made for another API major
│   └── PluginBroken            raised while it was imported or registered
├── CheckpointError
│   ├── CheckpointUnrecognised  no adapter knows this file
│   ├── CheckpointMismatch      two ends hold different weights
│   ├── CheckpointChanged       replaced or written to while it was in use
│   └── CheckpointCorrupt       truncated, foreign or damaged
├── PlanError                   a cut that the model does not have
│   └── PlanDoesNotFit          the blocks need more memory than there is
├── UnsupportedInput            the model was called with something that cannot cross a cut
├── WireError
│   ├── WireMalformed           a message that breaks the format
│   ├── WireTooLarge            a message over a limit
│   └── WireUnsupportedVersion  the ends speak different versions
├── TransportError
│   ├── Unreachable             nobody answers at the address
│   ├── TransportTimeout        a deadline passed
│   ├── PeerLost                the other end was there and is gone
│   └── NotAuthorised           a key, an invite or a permission is missing
├── SessionError
│   ├── SessionUnknown          the worker does not hold that session (any more)
│   ├── ConstantsMissing        the worker dropped constants of the generation; the host sends them again
│   └── Cancelled               the host stopped the work
├── LoraError
│   ├── LoraUnmatched           keys that name no parameter
│   ├── LoraTooLarge            over the limit of the policy
│   └── LoraMissing             the worker does not have it
└── RemoteError                 the worker failed; carries its traceback

Codec errors live in mesh_codec.errors (mesh_codec does not import mesh_core):
CodecError {CodecUnsupported, CodecCorrupt, CodecStateLost}.

A message says what happened, to what, and the next thing to try. ``hint`` holds the last part, so
that a page or a node can show it apart from the rest.
"""

from __future__ import annotations

from typing import ClassVar

from mesh_core.visible import visible_lines

__all__ = [
    "MAX_RENDERED",
    "Cancelled",
    "CheckpointChanged",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointMismatch",
    "CheckpointUnrecognised",
    "ConfigError",
    "ConstantsMissing",
    "LoraError",
    "LoraMissing",
    "LoraTooLarge",
    "LoraUnmatched",
    "MeshError",
    "NotAuthorised",
    "PeerLost",
    "PlanDoesNotFit",
    "PlanError",
    "PluginBroken",
    "PluginConflict",
    "PluginError",
    "PluginIncompatible",
    "PluginNotFound",
    "RemoteError",
    "SessionError",
    "SessionUnknown",
    "TransportError",
    "TransportTimeout",
    "Unreachable",
    "UnsupportedInput",
    "WireError",
    "WireMalformed",
    "WireTooLarge",
    "WireUnsupportedVersion",
    "by_name",
]

MAX_RENDERED = 4000
"""Longest text of an error that is rendered; the rest is cut. Errors cross the network."""


class MeshError(Exception):
    """Base of all mesh errors.

    Args:
        message: what happened, and to what. May repeat what came from elsewhere: whoever shows it, or ``hint``, makes
            it visible text, as ``str`` does.
        hint: what the reader can do now; appended to the message. Left out: ``remedy``.
    """

    remedy: ClassVar[str] = ""
    """What helps against errors of this kind, where nothing better is known."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = message[:MAX_RENDERED]
        self.hint = (hint or self.remedy)[:MAX_RENDERED]
        super().__init__(self.message)

    def __str__(self) -> str:
        return visible_lines(f"{self.message} Try: {self.hint}" if self.hint else self.message, 3 * MAX_RENDERED)


class ConfigError(MeshError):
    """Raised before anything runs: a setting, option, address or call argument that cannot be meant."""


class PluginError(MeshError):
    """Base of what goes wrong with an installed package; raised when something of it is first asked for."""


class PluginNotFound(PluginError):
    """Raised when nothing installed and enabled has the wanted adapter, codec or transport."""


class PluginConflict(PluginError):
    """Raised for a name that two distributions claim; neither of theirs is used."""


class PluginIncompatible(PluginError):
    """Raised for a plugin whose entry point is of another API major; it was not imported."""


class PluginBroken(PluginError):
    """Raised for a plugin that failed when it was imported, registered or called."""


class CheckpointError(MeshError):
    """Base of what goes wrong with model files; itself raised when one cannot be read at all."""

    remedy = "check that the file is there and that this user may read it"


class CheckpointUnrecognised(CheckpointError):
    """Raised where there is no checkpoint, or none that an installed adapter computes with."""

    remedy = "a .safetensors or .gguf file or a folder saved by diffusers, of a family that mesh plugins lists"


class CheckpointMismatch(CheckpointError):
    """Raised by a worker that holds no checkpoint with the host's fingerprint, which says what it holds; by a host
    whose weights in memory are not those of the file that workers would read, which names one."""


class CheckpointChanged(CheckpointError):
    """Raised when a file is no longer the one whose header was read; nothing that was read of it is used."""


class CheckpointCorrupt(CheckpointError):
    """Raised when a file breaks its format, ends early, or lacks what its family must have."""

    remedy = "copy or download it again"


class PlanError(MeshError):
    """Raised for spans that leave gaps, overlap, or lie outside of the model."""


class PlanDoesNotFit(PlanError):
    """Raised when a span's weights do not fit into what its worker, or this machine, has free."""


class UnsupportedInput(MeshError):
    """Raised before a step, for an argument that an adapter cannot carry to workers; names it."""


class WireError(MeshError):
    """Base of what is refused of a message; the sender is at fault, and nothing of it was used."""

    remedy = "the same version of comfyui-mesh on both machines"


class WireMalformed(WireError):
    """Raised for a message with missing, unknown, ill-typed or contradicting fields."""


class WireTooLarge(WireError):
    """Raised for a message or frame over a limit, before it is sent or before it is unpacked."""

    remedy = "a smaller picture or batch"


class WireUnsupportedVersion(WireError):
    """Raised for a message of another version of the wire format."""


class TransportError(MeshError):
    """Base of what goes wrong with connections; itself raised when an address cannot be listened at."""


class Unreachable(TransportError):
    """Raised when connecting: the name does not resolve, nobody listens, or what answers is no worker."""


class TransportTimeout(TransportError):
    """Raised when the other end is there, but did not answer or get to it within the deadline."""

    remedy = "mesh doctor, or a longer deadline in config.toml where the worker is only slow"


class PeerLost(TransportError):
    """Raised when a connection broke, or a worker stopped answering pings."""

    remedy = "mesh serve on that machine again, or mesh doctor to test the way there"


class NotAuthorised(TransportError):
    """Raised on the end that is refused: unknown or revoked key, used invite, or a worker with another key."""


class SessionError(MeshError):
    """Base of what a worker answers about a session or a step of it; itself raised in a process that was forked from
    the one whose session it is."""


class SessionUnknown(SessionError):
    """Raised when a worker was restarted or forgot the session; the host opens it again."""


class ConstantsMissing(SessionError):
    """Raised for a step whose constants the worker does not hold; the host sends them with the next attempt."""


class Cancelled(SessionError):
    """Raised out of a step that was asked to stop, before one of its layers."""


class LoraError(MeshError):
    """Base of what goes wrong with LoRAs; itself raised for tensors that fit neither algorithm nor weight."""

    remedy = "another copy of the file, or a LoRA that was made for this model"


class LoraUnmatched(LoraError):
    """Raised for a LoRA of which nothing names a parameter of the model: it was made for another."""


class LoraTooLarge(LoraError):
    """Raised instead of sending more than the user's settings, or a worker's library, allow."""


class LoraMissing(LoraError):
    """Raised for a name that no LoRA has, or more than one; or for one that may not be sent and is not there."""


class RemoteError(MeshError):
    """The worker failed while it worked for us.

    Args:
        message: the worker's own message.
        worker: name or address of the worker.
        remote_traceback: the worker's traceback as text, at most ``MAX_RENDERED`` characters.
    """

    remedy = "the worker's log, and mesh doctor"

    def __init__(self, message: str, *, hint: str = "", worker: str = "", remote_traceback: str = "") -> None:
        super().__init__(message, hint=hint)
        self.worker = worker
        self.remote_traceback = remote_traceback[-MAX_RENDERED:]


def _tree(root: type[MeshError]) -> dict[str, type[MeshError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def by_name(name: str) -> type[MeshError]:
    """The class of a mesh error that crossed the wire by name; ``RemoteError`` for any other name."""
    return _tree(MeshError).get(name, RemoteError)
