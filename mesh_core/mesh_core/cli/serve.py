"""``mesh serve``: a worker on this machine."""

from __future__ import annotations

import logging
import platform
import signal
import sys
from pathlib import Path
from types import FrameType

import click

from mesh_core.errors import ConfigError


@click.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path))
@click.option("--bind", default=None, help="Address to listen on; 0.0.0.0 for other machines. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="0 lets the system choose. [default: 7777]")
@click.option("--device", default=None, help="For example cuda:1 or cpu; left out: CUDA where there is one.")
@click.option("--memory", default="", help="Weights kept at most, for example 20GB; left out: what is free.")
@click.option("--name", default=None, help="What hosts call this worker. [default: this machine's name]")
@click.option("--insecure", is_flag=True, help="No encryption and no keys: whoever reaches the port is trusted.")
@click.option("--force", is_flag=True, help="Allow --insecure on an address that other machines reach.")
@click.option("--verbose", is_flag=True, help="Log what hosts ask for.")
def serve(
    models: tuple[Path, ...],
    bind: str | None,
    port: int | None,
    device: str | None,
    memory: str,
    name: str | None,
    insecure: bool,
    force: bool,
    verbose: bool,
) -> None:
    """Run a worker: host any span of the checkpoints in the folders MODELS, loaded when a host asks.

    Stop it with Ctrl-C.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(message)s")
    if not models:
        raise ConfigError("No folder with models was named.", hint="mesh serve models/")
    for path in models:
        if not path.exists():
            raise ConfigError(f"{path} does not exist.", hint="a folder with checkpoints, or one checkpoint")
    import torch

    from mesh_core.config import Settings, parse_bytes
    from mesh_core.keys import KeyStore
    from mesh_core.plugins import installed_plugins
    from mesh_core.worker import Worker, WorkerOptions

    settings, plugins = Settings.load(), installed_plugins()
    options = WorkerOptions(
        roots=models,
        name=name or platform.node() or "worker",
        device=checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        memory=parse_bytes(memory) if memory else settings.worker.memory_budget,
        client_key="" if insecure else KeyStore().identity().client.public,
        settings=settings,
    )
    host, number = bind or settings.worker.bind, settings.worker.port if port is None else port
    address = f"mesh://{f'[{host}]' if ':' in host else host}:{number}"
    flags = {flag: True for flag, on in (("insecure", insecure), ("force", force)) if on}
    listener = plugins.transport("mesh").listen(address, **flags)
    worker = Worker(options, listener, plugins)
    _stop_on_signals(worker)
    _announce(worker, listener.address, insecure)
    worker.serve()


def checked_device(text: str) -> str:
    """``text`` if torch can use it.

    Raises:
        ConfigError: it is no device, or this machine does not have it.
    """
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"Device {text!r} cannot be used: {reason}", hint="cpu, cuda or cuda:1; mesh doctor") from error
    return text


def _stop_on_signals(worker: object) -> None:
    def stop(signum: int, frame: FrameType | None) -> None:
        worker.stop()  # type: ignore[attr-defined]

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def _announce(worker: object, address: str, insecure: bool) -> None:
    from mesh_core.worker import Worker

    assert isinstance(worker, Worker)
    for checkpoint in worker.library.scan():
        click.echo(f"  {checkpoint.name}: {checkpoint.spec.family} {checkpoint.spec.variant}", err=True)
    click.echo(f"listening at {address}", err=True)
    sys.stderr.flush()
