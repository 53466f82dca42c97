"""``mesh join``: become a member of somebody's worker."""

from __future__ import annotations

import click

from mesh_core.system.option_types import SECONDS, PrintableText
from mesh_core.system.terminal import say


@click.command()
@click.argument("invite")
@click.option(
    "--name",
    type=PrintableText(),
    default="",
    help="What the worker's owner will see you as; this machine's name by default.",
)
@click.option("--timeout", type=SECONDS, default=10.0, show_default=True, help="Seconds to wait for the worker.")
def join(invite: str, name: str, timeout: float) -> None:
    """Accept a worker's invite.

    INVITE is the line that mesh serve or mesh keys invite printed on the worker's machine, in quotes. It works once.
    """
    from mesh_core.transport.invites import accept_invite

    worker = accept_invite(invite, name=name, timeout=timeout)
    say(f"Joined {worker.name}. Use it as: --worker mesh://{worker.address}")
