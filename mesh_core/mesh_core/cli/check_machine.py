"""What ``mesh doctor`` looks at on this machine. Each check works whatever the others find."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

from mesh_core import __version__
from mesh_core.builtin import load_plugins
from mesh_core.cli.findings import Finding, Verdict, guarded
from mesh_core.errors import ConfigError
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings, atomic_write, cache_dir, config_dir, in_bytes

MACHINE = "this machine"
_OLDEST_PYTHON = (3, 10)
_PROBLEMS: dict[str, Verdict] = {"broken": "FAIL", "conflict": "FAIL", "incompatible": "warn"}


def check_machine(plugins: Plugins) -> Iterator[Finding]:
    """All checks that need no worker."""
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _python,
        "torch": _torch,
        "diffusers": _diffusers,
        "encryption": _encryption,
        "settings": _settings,
        "keys": _keys,
        "cache": _cache,
        "plugins": lambda: _plugins(plugins),
    }
    for name, find in parts.items():
        yield from guarded(MACHINE, name, find)


def usable_plugins() -> Plugins:
    """The installed plugins; all of them when the settings that switch some off cannot be read."""
    try:
        return load_plugins()
    except ConfigError:
        return load_plugins(disabled=())


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, comfyui-mesh {__version__}"
    if sys.version_info[:2] < _OLDEST_PYTHON:
        yield Finding(MACHINE, "python", "FAIL", found, "Python 3.10 or newer")
    else:
        yield Finding(MACHINE, "python", "ok", found)


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        hint = "install torch anew: https://pytorch.org/get-started/locally"
        yield Finding(MACHINE, "torch", "FAIL", f"torch cannot be imported: {error}", hint)
        return
    from mesh_core.system.device import default_device, free_memory, label

    device = default_device()
    built = torch.version.cuda or torch.version.hip or "no GPU support"
    found = f"{torch.__version__} ({built}); {label(device)}, {in_bytes(free_memory(device))} for weights"
    if device.type == "cpu":
        hint = "fine for a host that runs no blocks; else a torch built for this machine's GPU, and its driver"
        yield Finding(MACHINE, "torch", "warn", f"{found}; no GPU is usable", hint)
    else:
        yield Finding(MACHINE, "torch", "ok", found)


def _diffusers() -> Iterator[Finding]:
    try:
        yield Finding(MACHINE, "diffusers", "ok", version("diffusers"))
    except PackageNotFoundError:
        hint = 'pip install "comfyui-mesh[diffusers]"'
        yield Finding(
            MACHINE, "diffusers", "warn", "not installed; mesh generate and the built-in adapters use it", hint
        )


def _encryption() -> Iterator[Finding]:
    from mesh_core.transport.curve import available

    found = f"pyzmq {version('pyzmq')}"
    if available():
        yield Finding(MACHINE, "encryption", "ok", f"{found} with CURVE")
    else:
        hint = "pip install --force-reinstall pyzmq, for its own build of libzmq"
        yield Finding(MACHINE, "encryption", "FAIL", f"{found} was built without CURVE", hint)


def _settings() -> Iterator[Finding]:
    Settings.load()
    file = config_dir() / "config.toml"
    yield Finding(MACHINE, "settings", "ok", str(file) if file.exists() else f"defaults; {file} does not exist")


def _keys() -> Iterator[Finding]:
    from mesh_core.transport.keys import KeyStore

    store = KeyStore()
    own = store.identity().client.public
    found = f"{len(store.workers())} known workers, {len(store.clients())} authorised clients"
    yield Finding(MACHINE, "keys", "ok", f"{found}; own key {own[:8]}...")


def _cache() -> Iterator[Finding]:
    probe = cache_dir() / "doctor"
    atomic_write(probe, bytes(64 << 10))  # on a full disk an empty file can still be written
    probe.unlink()
    yield Finding(MACHINE, "cache", "ok", f"{cache_dir()} can be written")


def _plugins(plugins: Plugins) -> Iterator[Finding]:
    reports = plugins.report()
    for report in reports:
        if report.status in _PROBLEMS:
            status = _PROBLEMS[report.status]
            yield Finding(MACHINE, f"plugin {report.name}", status, f"{report.label}: {report.detail}", report.hint)
    families = ", ".join(f"{f} {v}" for f, v in sorted(plugins.adapter_versions().items()))
    if families:
        yield Finding(MACHINE, "adapters", "ok", families)
    else:
        yield Finding(
            MACHINE,
            "adapters",
            "warn",
            "none is in use",
            "pip install comfyui-mesh-FAMILY for your model; mesh plugins",
        )
    codecs = plugins.codecs()
    yield Finding(MACHINE, "codecs", "ok", ", ".join(sorted(codecs)))
    for name, codec in sorted(codecs.items()):
        for wrong, todo in codec.remedies():
            yield Finding(MACHINE, f"codec {name}", "warn", wrong, todo)
