"""How a node names workers: known ones by name and address, others by an address or an invite that is pasted.

Nothing connects before a prompt runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh_core.errors import ConfigError
from mesh_core.transport.keys import KeyStore, KnownWorker
from mesh_core.visible import visible

from .texts import PASTED


@dataclass(frozen=True)
class WorkerRef:
    """A worker of a chain; ``blocks``: how many it runs, None to share what is left."""

    address: str
    blocks: int | None = None


def label(worker: KnownWorker) -> str:
    """How the worker combo shows a worker; `address_of` reads it."""
    return f"{visible(worker.name)} @ {worker.address}"


def choices(keys: KeyStore | None = None) -> list[str]:
    """What the worker combo offers."""
    return [*(label(worker) for worker in (keys or KeyStore()).workers()), PASTED]


def address_of(choice: str, pasted: str) -> str:
    """The address that a combo and its text field stand for; an invite is accepted the first time.

    Raises:
        ConfigError: neither names a worker.
        NotAuthorised, Unreachable: the invite cannot be used.
    """
    text = pasted.strip().strip('"') if choice == PASTED else f"mesh://{choice.rpartition(' @ ')[2]}"
    text = text.removeprefix("mesh join ").strip().strip('"')
    if not text:
        raise ConfigError(
            "No worker was chosen.",
            hint="a worker from the list, or 'pasted below' with the line that mesh serve printed",
        )
    if "token=" not in text:
        return text
    from mesh_core.transport.invites import accept_invite, parse_invite

    invite = parse_invite(text)
    known = KeyStore().worker(invite.place.netloc)
    if known is None or known.key != invite.server_key:
        accept_invite(text)
    return f"mesh://{invite.place.netloc}"
