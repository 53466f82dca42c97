"""Which files of a model folder hold its weights, where it holds them more than once: as they are, and in variants.

The names are diffusers': ``diffusion_pytorch_model.safetensors`` and, of the variant ``fp16``,
``diffusion_pytorch_model.fp16.safetensors``; with an index where they are in shards. Reads no file.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from mesh_core.errors import CheckpointError, CheckpointUnrecognised
from mesh_core.model.folders import safetensors_among

_STEM = "diffusion_pytorch_model"
_SHARD = r"-\d{5}-of-\d{5}"
_NAMED = re.compile(
    rf"{_STEM}\.(?P<variant>[\w-]+?)({_SHARD})?\.safetensors"
    rf"|{_STEM}{_SHARD}\.(?P<old>[\w-]+)\.safetensors"  # as diffusers named them before 0.32
    rf"|{_STEM}\.safetensors\.index\.(?P<index>[\w-]+)\.json"
    rf"|{_STEM}\.safetensors\.(?P<old_index>[\w-]+)\.index\.json"
)


def variant_of(file: Path) -> str:
    """The variant that a file of weights, or their index, belongs to; "" for the plain ones."""
    match = _NAMED.fullmatch(file.name)
    return next((name for name in match.groupdict().values() if name), "") if match else ""


def variants(folder: Path) -> list[str]:
    """The variants that ``folder`` holds weights of, "" for the plain ones, sorted."""
    return sorted(_weights(folder))


def files_of(folder: Path, variant: str | None) -> list[Path]:
    """The index of a variant's weights alone, or where there is none its .safetensors files, sorted.

    Args:
        variant: None for the plain weights, or the only variant that there is.

    Raises:
        CheckpointUnrecognised: there are none; says which there are.
        CheckpointError: the folder cannot be read.
    """
    found = _weights(folder)
    if not found:
        raise CheckpointUnrecognised(
            f"{folder} holds no .safetensors file.", hint="a .safetensors or .gguf file, or a folder saved by diffusers"
        )
    if variant is None:
        variant = "" if "" in found or len(found) > 1 else next(iter(found))
    if variant not in found:
        named = sorted(filter(None, found))
        there = ", ".join((["plain ones"] if "" in found else []) + [repr(name) for name in named])
        hint = f"variant={named[0]!r} (--variant {named[0]})" if named else "no variant, for the plain weights"
        what = f"the variant {variant!r}" if variant else "no variant"
        raise CheckpointUnrecognised(f"{folder} holds no weights of {what}; there: {there}.", hint=hint)
    indices = [file for file in found[variant] if file.suffix == ".json"]
    return indices[:1] or found[variant]


def default_file(folder: Path, variant: str) -> Path:
    """Where diffusers writes weights that are in one file."""
    return folder / (f"{_STEM}.{variant}.safetensors" if variant else f"{_STEM}.safetensors")


def _weights(folder: Path) -> Mapping[str, list[Path]]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}.") from error
    indices = [e for e in entries if ".safetensors." in e.name and e.name.endswith(".json") and "index" in e.name]
    found: dict[str, list[Path]] = defaultdict(list)
    for file in [*indices, *safetensors_among(entries)]:
        found[variant_of(file)].append(file)
    return found
