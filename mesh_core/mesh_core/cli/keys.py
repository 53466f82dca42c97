"""``mesh keys``: who may use this machine's workers, and which workers this user knows."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime

import click

from mesh_core.system.option_types import FiniteNumber, PrintableText
from mesh_core.system.terminal import say, say_json


@click.group()
def keys() -> None:
    """List, invite and revoke those who may use this machine's workers.

    This user's own programs on this machine need no key. Changes act at once, also on workers that are running.
    """


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_keys(as_json: bool) -> None:
    """Show authorised clients, open invites and known workers. Secret keys are never shown."""
    from mesh_core.transport.keys import KeyStore

    store = KeyStore()
    own = store.identity()
    tables = {
        "clients": [asdict(client) for client in store.clients()],
        "invites": [asdict(invite) for invite in store.invites()],
        "workers": [asdict(worker) for worker in store.workers()],
    }
    if as_json:
        identity = {"client": own.client.public, "server": own.server.public}
        say_json({"identity": identity, **tables})
        return
    say(f"own client key  {own.client.public}")
    say(f"own server key  {own.server.public}")
    _section("authorised clients", [f"{c.name}  {c.key}  since {_day(c.added)}" for c in store.clients()])
    _section("open invites", [f"{i.name}  {i.key}  until {_day(i.until)}" for i in store.invites()])
    _section("known workers", [f"{w.name}  mesh://{w.address}  {w.key}" for w in store.workers()])


@keys.command()
@click.option("--address", default="", help="Where the host reaches the worker, mesh://HOST:PORT.")
@click.option(
    "--name",
    type=PrintableText(),
    default="",
    help="What the host will call the worker; this machine's name by default.",
)
@click.option(
    "--minutes", type=FiniteNumber(0.1, 527_040), default=60.0, show_default=True, help="How long the invite is good."
)
def invite(address: str, name: str, minutes: float) -> None:
    """Print an invite for one more host. Workers that are running accept it too."""
    from mesh_core.system.config import Settings
    from mesh_core.transport.invites import create_invite

    where = address or f"mesh://0.0.0.0:{Settings.load().worker.port}"
    made = create_invite(where, name=name, lifetime=minutes * 60)
    say(f'mesh join "{made}"')
    say(f"Works once, until {_day(made.until)}. Whoever has this line can use it.", err=True)


@keys.command()
@click.argument("who")
def revoke(who: str) -> None:
    """Refuse a client from now on. WHO is its name or its key."""
    from mesh_core.transport.keys import KeyStore

    for client in KeyStore().revoke(who):
        say(f"Revoked {client.name or client.key}.")


@keys.command()
@click.argument("who")
def forget(who: str) -> None:
    """Drop what is known of a worker. WHO is its name or its address."""
    from mesh_core.transport.keys import KeyStore

    for worker in KeyStore().forget(who):
        say(f"Forgot {worker.name} at mesh://{worker.address}.")


def _section(title: str, lines: list[str]) -> None:
    say()
    say(title)
    for line in lines or ["none"]:
        say(f"  {line}")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
