"""``mesh serve``: a worker on this machine."""

from __future__ import annotations

import gc
import logging
import os
import platform
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from mesh_core.cli.announcement import announce
from mesh_core.cli.values import parse_lora
from mesh_core.errors import ConfigError
from mesh_core.system.allocator import use_growing_segments
from mesh_core.system.logs import start_logging
from mesh_core.system.option_types import PrintableText
from mesh_core.system.terminal import Coloured, say

if TYPE_CHECKING:
    from mesh_core.system.config import Settings
    from mesh_core.worker.server import Worker, WorkerOptions


@click.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path))
@click.option("--bind", default=None, help="Address to listen on; 0.0.0.0 for other machines. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="0 lets the system choose. [default: 7777]")
@click.option("--device", default=None, help="For example cuda:1 or cpu; left out: a GPU if any.")
@click.option("--memory", default="", help="Weights kept at most, for example 20GB; left out: what is free.")
@click.option(
    "--loras", multiple=True, type=click.Path(path_type=Path), help="Folder with LoRAs that hosts may use. Repeat."
)
@click.option("--lora", "presets", multiple=True, help="FILE or FILE=STRENGTH: every session has it first. Repeat.")
@click.option(
    "--name", type=PrintableText(), default=None, help="What hosts call this worker. [default: this machine's name]"
)
@click.option("--insecure", is_flag=True, help="No encryption and no keys: whoever reaches the port is trusted.")
@click.option("--force", is_flag=True, help="Allow --insecure on an address that other machines reach.")
@click.option("--verify", is_flag=True, help="First read and hash all checkpoints, whatever is remembered of them.")
@click.option("--verbose", is_flag=True, help="Log what hosts ask for.")
def serve(
    models: tuple[Path, ...],
    bind: str | None,
    port: int | None,
    insecure: bool,
    force: bool,
    verify: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Run a worker: host any span of the checkpoints in the folders MODELS, loaded when a host asks.

    Stop it with Ctrl-C.
    """
    use_growing_segments()
    start_logging(logging.INFO if verbose else logging.WARNING)
    presets = [parse_lora(text) for text in options.pop("presets")]
    _check_paths(models, options["loras"], presets)
    from mesh_core.builtin import installed_plugins
    from mesh_core.system.config import Settings
    from mesh_core.worker.server import Worker

    settings, plugins = Settings.load(), installed_plugins()
    worker_options = _options(settings, models, presets, insecure=insecure, **options)
    address = _address(bind or settings.worker.bind, settings.worker.port if port is None else port)
    flags = {flag: True for flag, on in (("insecure", insecure), ("force", force)) if on}
    listener = plugins.transport("mesh").listen(address, **flags)
    worker = Worker(worker_options, listener, plugins)
    if verify:
        _verify(worker)
    _stop_on_signals(worker)
    announce(worker, listener.address)
    # What was imported stays: looking through it for garbage, again and again, would stop all threads for long.
    gc.freeze()
    if not worker.serve():
        # Python would wait at its end for what does not end.
        say("Something in this worker hangs; it is given up.", err=True)
        sys.stderr.flush()
        os._exit(0)


def _address(host: str, port: int) -> str:
    """Where to listen. Raises ConfigError if ``host`` holds more than a name or an address."""
    host = host.strip().strip("[]")
    if "/" in host or host.count(":") == 1:
        raise ConfigError(
            f"{host[:200]!r} is no address to listen on: it is a name or an IP address alone.",
            hint=f"--bind 0.0.0.0 --port {port}",
        )
    return f"mesh://{f'[{host}]' if ':' in host else host}:{port}"


def _check_paths(models: tuple[Path, ...], loras: tuple[Path, ...], presets: list[tuple[str, float]]) -> None:
    """Refuse what is not there before anything slow is imported."""
    if not models:
        raise ConfigError("No folder with models was named.", hint="mesh serve models/")
    for paths, hint in (
        (models, "a folder with checkpoints, or one checkpoint"),
        (loras, "a folder with LoRAs, or one LoRA"),
    ):
        for path in paths:
            if not path.exists():
                raise ConfigError(f"{path} does not exist.", hint=hint)
    for file, _ in presets:
        if not Path(file).is_file():
            raise ConfigError(f"{file} is no file.", hint="--lora turbo.safetensors=0.8")


def _options(
    settings: Settings,
    models: tuple[Path, ...],
    presets: list[tuple[str, float]],
    *,
    insecure: bool,
    name: str | None,
    device: str | None,
    memory: str,
    loras: tuple[Path, ...],
) -> WorkerOptions:
    from mesh_core.system.config import parse_bytes
    from mesh_core.system.device import checked_device, default_device
    from mesh_core.transport.keys import KeyStore
    from mesh_core.worker.server import WorkerOptions

    return WorkerOptions(
        roots=models,
        name=name or platform.node() or "worker",
        device=str(checked_device(device) if device else default_device()),
        memory=parse_bytes(memory, least=1) if memory else settings.worker.memory_budget,
        client_key="" if insecure else KeyStore().identity().client.public,
        settings=settings,
        loras=(*loras, *(Path(file) for file, _ in presets)),
        preset=tuple((Path(file).name, strength) for file, strength in presets),
    )


def _stop_on_signals(worker: Worker) -> None:
    def stop(signum: int, frame: FrameType | None) -> None:
        worker.stop()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def _verify(worker: Worker) -> None:
    """Hash what is served; what changed unseen is served as what it is now, which no host asks for."""
    from mesh_core.cli.check_files import content
    from mesh_core.cli.progress import LoadingLine
    from mesh_core.errors import CheckpointError

    for checkpoint in worker.library.scan():
        try:
            status, detail, hint = content(checkpoint, LoadingLine())
        except CheckpointError as error:
            status, detail, hint = "FAIL", error.message, error.hint
        say(Coloured(f"  {checkpoint.name}: {detail}", "red" if status == "FAIL" else None), err=True)
        if hint:
            say(f"        try: {hint}", err=True)
