"""How single files name the formats of their layers: a note in the header, or a small tensor beside each weight.

Both hold the same JSON per layer: ``{"format": NAME, option: value, ...}``. The note ``_quantization_metadata`` is
``{"format_version": "1.0", "layers": {LAYER: ...}}``; the tensor is ``LAYER.comfy_quant``, U8.

Several formats read the same note, and each takes its own layers. So that one may say that it agrees with the whole of
it, `marked_layers` refuses layers in formats that are not in `FORMATS`; each of those has to take the layers that it is
named for, or refuse them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec

from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised
from mesh_core.model.stored import Header

NOTE = "_quantization_metadata"
"""Of a file's metadata."""

SUFFIX = ".comfy_quant"
"""Of the tensors' names."""

_MATMUL: Mapping[str, type] = {"full_precision_matrix_mult": bool}
"""Inputs of such a layer are never quantised, whatever the card can do."""

COMPANIONS = (
    "scaled_fp8",
    "comfy_quant",
    "weight_scale",
    "weight_scale_2",
    "scale_weight",
    "input_scale",
    "scale_input",
)
"""Last parts of the names of tensors that say how a weight beside them is stored, in layouts that the core reads."""

CONFIG = "quantization_config"
"""Of ``config.json``."""

_BFL_CONFIG = {"quant_method", "compute_dtype", "pre_quantized"}

FORMATS: Mapping[str, Mapping[str, type]] = {
    "float8_e4m3fn": _MATMUL,
    "float8_e5m2": _MATMUL,
    "nvfp4": _MATMUL,
    "mxfp8": _MATMUL,
    "int8_tensorwise": {**_MATMUL, "convrot": bool, "convrot_groupsize": int, "per_row": bool},
}
"""The formats that the core reads, by the name in markers, each with its options."""

_Read = TypeVar("_Read")

Option = bool | int | str

_MOST_BYTES = 8 << 20
"""Of a note that is parsed: ten thousand layers take less than one."""

_MOST_LAYERS = 20_000

_MOST_MARKER_BYTES = 4096

_Name = Annotated[str, msgspec.Meta(max_length=512)]
_Value = bool | int | Annotated[str, msgspec.Meta(max_length=64)] | None
_Options = dict[_Name, _Value | Annotated[dict[_Name, _Value], msgspec.Meta(max_length=16)]]
_Layer = Annotated[_Options, msgspec.Meta(max_length=16)]


class _Note(msgspec.Struct, forbid_unknown_fields=True):
    layers: Annotated[dict[_Name, _Layer], msgspec.Meta(max_length=_MOST_LAYERS)]
    format_version: str | float = "1.0"


_NOTE = msgspec.json.Decoder(_Note)
_LAYER = msgspec.json.Decoder(_Layer)

_VERSIONS = ("1.0", 1.0)

_HINT = "a file in one of the formats " + ", ".join(FORMATS) + ", or a bfloat16 copy of the model"


@dataclass(frozen=True)
class Marker:
    """What is said of one layer.

    Attributes:
        format: one of `FORMATS`.
        options: that the format has and the file gives; never one that is null.
    """

    format: str
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Marked:
    """All that is said of a file's layers.

    Attributes:
        layers: by name: that of the weight without ``.weight``.
        tensors: the names of the marker tensors by layer.
        metadata: the entries of the file's metadata that were read, as `Claim.metadata` wants them.
    """

    layers: Mapping[str, Marker] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    metadata: frozenset[str] = frozenset()

    def of(self, *formats: str) -> dict[str, Marker]:
        """The layers in these formats, by name."""
        return {layer: marker for layer, marker in self.layers.items() if marker.format in formats}


def marked_layers(header: Header) -> Marked:
    """What notes and marker tensors say; empty where there are none.

    Raises:
        CheckpointCorrupt: not readable, of a layer that is not there, or two that contradict each other.
        CheckpointUnrecognised: a layer is in a format, or has an option, that is not in `FORMATS`.
    """
    layers: dict[str, Marker] = {}
    tensors: dict[str, str] = {}
    note = header.metadata.get(NOTE)
    if note is not None:
        layers = {layer: _marker(header, layer, said) for layer, said in _read_note(header, note).items()}
    for name, info in header.tensors.items():
        if not name.endswith(SUFFIX):
            continue
        layer = name.removesuffix(SUFFIX)
        if info.dtype != "U8" or len(info.shape) != 1:
            raise CheckpointCorrupt(f"{header.path}: {name} is {info.dtype} {list(info.shape)}, not bytes of JSON.")
        if len(tensors) >= _MOST_LAYERS:
            raise CheckpointCorrupt(f"{header.path} has more than {_MOST_LAYERS} markers of layers.")
        said = _decoded(_LAYER, header.content(info, _MOST_MARKER_BYTES), f"{header.path}: {name}")
        marker = _marker(header, layer, said)
        if layers.setdefault(layer, marker) != marker:
            raise CheckpointCorrupt(f"{header.path}: {name} contradicts what the file's metadata says of that layer.")
        tensors[layer] = name
    for layer in layers:
        if f"{layer}.weight" not in header.tensors:
            raise CheckpointCorrupt(
                f"{header.path} says how {layer[:200]!r} is stored, and has no such weight.",
                hint="a file whose markers name its layers as its tensors are named, prefix included",
            )
    return Marked(layers, tensors, frozenset() if note is None else frozenset({NOTE}))


def bfl_config(header: Header) -> frozenset[str]:
    """The entries of ``config.json`` that say no more than that weights are stored as Black Forest Labs does.

    diffusers reads such files (its configuration ``bfl``) by the tensors beside each weight alone, row-scaled fp8 and
    nvfp4 in one file. Empty where the configuration is missing, of another kind, or says anything more.
    """
    said = header.config.get(CONFIG)
    agreed = isinstance(said, dict) and said.get("quant_method") == "bfl" and said.keys() <= _BFL_CONFIG
    return frozenset({CONFIG}) if agreed else frozenset()


def _read_note(header: Header, note: str) -> Mapping[str, _Options]:
    if len(note) > _MOST_BYTES:
        raise CheckpointCorrupt(f"{header.path}: {NOTE} has {len(note)} characters; at most {_MOST_BYTES} are read.")
    read = _decoded(_NOTE, note, f"{header.path}: {NOTE} in its metadata")
    if read.format_version not in _VERSIONS:
        raise CheckpointUnrecognised(
            f"{header.path}: {NOTE} has version {str(read.format_version)[:20]!r}; 1.0 is read.", hint=_HINT
        )
    return read.layers


def _marker(header: Header, layer: str, said: _Options) -> Marker:
    """Options may stand in an object ``params`` of their own."""
    where = f"{header.path}: what is said of {layer[:200]!r}"
    inner = said.get("params") or {}
    if not isinstance(inner, dict):
        raise CheckpointCorrupt(f"{where} has params that are no options.")
    flat: dict[str, Option] = {}
    for name, value in [*((n, v) for n, v in said.items() if n != "params"), *inner.items()]:
        if value is None:
            continue
        if isinstance(value, dict) or flat.setdefault(name, value) != value:
            raise CheckpointCorrupt(f"{where} has no one value of {name[:64]!r}.")
    format = flat.pop("format", None)
    if not isinstance(format, str):
        raise CheckpointCorrupt(f"{where} names no format.")
    if format not in FORMATS:
        raise CheckpointUnrecognised(f"{where} is that it is stored as {format!r}, which is not read.", hint=_HINT)
    for name, value in sorted(flat.items()):
        if type(value) is not FORMATS[format].get(name):
            raise CheckpointUnrecognised(
                f"{where} is that it is stored as {format!r} with {name[:64]!r}, whose meaning is not known.",
                hint=_HINT,
            )
    return Marker(format, flat)


def _decoded(decoder: msgspec.json.Decoder[_Read], content: str | bytes, what: str) -> _Read:
    try:
        return decoder.decode(content)
    except msgspec.ValidationError as error:
        raise CheckpointUnrecognised(f"{what} names formats in a way that is not read: {error}.", hint=_HINT) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise CheckpointCorrupt(f"{what} is not readable JSON: {error}.") from error
