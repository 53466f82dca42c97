"""The core's own plugins, and the plugins of an environment with them in front.

Each is written as anybody's would be, against `mesh_core.hookspecs`. Imports each part only when its hook is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from mesh_core.plugins.registry import Plugins

__all__ = ["builtin_plugins", "installed_plugins", "load_plugins"]


def builtin_plugins() -> Mapping[str, object]:
    """New instances of the core's plugins, by name."""
    from mesh_core.builtin.codec_choice import DefaultCodecChoice
    from mesh_core.builtin.codecs import CoreCodecs
    from mesh_core.builtin.lora_policy import DefaultLoraPlacement
    from mesh_core.builtin.split import DefaultSplit
    from mesh_core.builtin.transports import CoreTransports
    from mesh_core.builtin.weight_formats import CoreWeightFormats

    return {
        "core.transports": CoreTransports(),
        "core.codecs": CoreCodecs(),
        "core.weight-formats": CoreWeightFormats(),
        "core.split": DefaultSplit(),
        "core.codec-choice": DefaultCodecChoice(),
        "core.lora-placement": DefaultLoraPlacement(),
    }


def load_plugins(disabled: Iterable[str] | None = None) -> Plugins:
    """The plugins of this environment; ``disabled`` is by default what the settings say.

    Raises:
        ConfigError: the settings file is damaged.
    """
    return Plugins.load(builtin_plugins(), disabled)


@cache
def installed_plugins() -> Plugins:
    """The plugins of this environment, found once per process."""
    return load_plugins()
