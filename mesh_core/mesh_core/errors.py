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

MAX_RENDERED = 4000
"""Longest text of an error that is rendered; the rest is cut. Errors cross the network."""


class MeshError(Exception):
    """Base of all mesh errors.

    Args:
        message: what happened, and to what.
        hint: what the reader can do now; appended to the message.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = message[:MAX_RENDERED]
        self.hint = hint[:MAX_RENDERED]
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} Try: {self.hint}" if self.hint else self.message


class ConfigError(MeshError): ...


class PluginError(MeshError): ...


class PluginNotFound(PluginError): ...


class PluginConflict(PluginError): ...


class PluginIncompatible(PluginError): ...


class PluginBroken(PluginError): ...


class CheckpointError(MeshError): ...


class CheckpointUnrecognised(CheckpointError): ...


class CheckpointMismatch(CheckpointError): ...


class CheckpointCorrupt(CheckpointError): ...


class PlanError(MeshError): ...


class PlanDoesNotFit(PlanError): ...


class UnsupportedInput(MeshError): ...


class WireError(MeshError): ...


class WireMalformed(WireError): ...


class WireTooLarge(WireError): ...


class WireUnsupportedVersion(WireError): ...


class TransportError(MeshError): ...


class Unreachable(TransportError): ...


class TransportTimeout(TransportError): ...


class PeerLost(TransportError): ...


class NotAuthorised(TransportError): ...


class SessionError(MeshError): ...


class SessionUnknown(SessionError): ...


class ConstantsMissing(SessionError): ...


class Cancelled(SessionError): ...


class LoraError(MeshError): ...


class LoraUnmatched(LoraError): ...


class LoraTooLarge(LoraError): ...


class LoraMissing(LoraError): ...


class RemoteError(MeshError):
    """The worker failed while it worked for us.

    Args:
        message: the worker's own message.
        worker: name or address of the worker.
        remote_traceback: the worker's traceback as text, at most ``MAX_RENDERED`` characters.
    """

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
