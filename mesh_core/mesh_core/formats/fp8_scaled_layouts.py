"""How files say that a weight is 8-bit floats with one scale: two markings, which are read into one form.

New: ``X.weight``, ``X.weight_scale``, perhaps ``X.input_scale``, and a marker that names the layer
(`mesh_core.formats.markers`). Old: ``X.weight``, ``X.scale_weight``, perhaps ``X.scale_input``, and one empty tensor
``scaled_fp8`` for all layers with its prefix; if that has two elements, inputs are never quantised.

Scales without either are refused: ComfyUI would ignore them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised
from mesh_core.formats.companions import SCALAR, companion
from mesh_core.formats.float8 import E4M3, E5M2, TYPES
from mesh_core.formats.markers import marked_layers
from mesh_core.model.stored import Claim, Header, StoredTensor, WeightFormat

FULL = "F8_E4M3-full"
"""The kind whose inputs are never quantised."""

_DTYPES: Mapping[str, str] = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}
"""Of the weights, by the name in markers."""

_OLD_MARKER = "scaled_fp8"

_OLD_DTYPES: Mapping[str, str] = {**{dtype: dtype for dtype in TYPES}, "F32": E4M3}
"""Of the weights, by that of the old marker."""

_HINT = "the same model with the markers that ComfyUI writes today, or a bfloat16 copy of it"


class _Found:
    """What has been claimed so far."""

    def __init__(self, format: WeightFormat, header: Header) -> None:
        self.format = format
        self.header = header
        self.tensors: dict[str, StoredTensor] = {}
        self.markers: set[str] = set()

    def layer(self, layer: str, dtype: str, names: tuple[str, str], full: bool) -> None:
        """Take a layer.

        Args:
            dtype: that its marker names.
            names: last parts of the names of its scale and of that of its inputs.
        """
        tensors, path = self.header.tensors, self.header.path
        weight = tensors.get(f"{layer}.weight")
        if weight is None:
            raise CheckpointCorrupt(f"{path} has {layer}.{names[0]} and no {layer}.weight.")
        if weight.dtype != dtype:
            raise CheckpointUnrecognised(
                f"{path} says that {weight.name} is stored in {dtype} with a scale, and has it in {weight.dtype}.",
                hint=_HINT,
            )
        if len(weight.shape) != 2:
            raise CheckpointUnrecognised(
                f"{path} has a scale for {weight.name}, which is no matrix: {list(weight.shape)}.", hint=_HINT
            )
        parts = {"codes": weight, "scale": companion(self.header, f"{layer}.{names[0]}", ("F32",), SCALAR)}
        kind = FULL if full and dtype == E4M3 else dtype
        if f"{layer}.{names[1]}" in tensors:
            inputs = companion(self.header, f"{layer}.{names[1]}", ("F32",), SCALAR)
            if kind == E4M3:
                parts["input_scale"] = inputs
            else:
                self.markers.add(inputs.name)
        self.tensors[weight.name] = StoredTensor(self.format, kind, weight.shape, parts)


def claim(format: WeightFormat, header: Header) -> Claim:
    """What `Fp8ScaledFormat` takes; of the markers' note all, since formats that the core does not have are refused.

    Raises:
        CheckpointCorrupt: a weight or a scale is missing, or of another shape.
        CheckpointUnrecognised: scales without a marker, both markings, or weights in another type than it names.
    """
    marked = marked_layers(header)
    found = _Found(format, header)
    for layer, marker in marked.of(*_DTYPES).items():
        full = bool(marker.options.get("full_precision_matrix_mult", False))
        found.layer(layer, _DTYPES[marker.format], ("weight_scale", "input_scale"), full)
        found.markers |= {marked.tensors[layer]} if layer in marked.tensors else set()
    old = _old_markers(header)
    if old and marked.layers:
        raise CheckpointUnrecognised(f"{header.path} has markers of two kinds, {min(old)} among them.", hint=_HINT)
    for layer in _layers_with(header, "scale_weight"):
        prefix = max((p for p in old.values() if layer.startswith(p)), key=len, default=None)
        if prefix is None:
            raise _unmarked(header, f"{layer}.scale_weight")
        marker_info = header.tensors[f"{prefix}{_OLD_MARKER}"]
        full = prod(marker_info.shape) == 2
        found.layer(layer, _OLD_DTYPES[marker_info.dtype], ("scale_weight", "scale_input"), full)
    found.markers |= old.keys()
    for layer in _layers_with(header, "weight_scale"):
        scale, weight = header.tensors[f"{layer}.weight_scale"], header.tensors.get(f"{layer}.weight")
        unmarked = layer not in marked.layers and weight is not None and weight.dtype in TYPES
        if unmarked and scale.dtype == "F32" and scale.shape in SCALAR:
            raise _unmarked(header, scale.name)
    return Claim(found.tensors, frozenset(found.markers), marked.metadata)


def _layers_with(header: Header, leaf: str) -> Iterable[str]:
    return [name.removesuffix(f".{leaf}") for name in header.tensors if name.endswith(f".{leaf}")]


def _old_markers(header: Header) -> dict[str, str]:
    """Their prefixes by name."""
    found = {name: name.removesuffix(_OLD_MARKER) for name in header.tensors if name.rpartition(".")[2] == _OLD_MARKER}
    for name in found:
        info = header.tensors[name]
        if info.dtype not in _OLD_DTYPES or prod(info.shape) > 2:
            raise CheckpointUnrecognised(
                f"{header.path}: {name} is {info.dtype} {list(info.shape)}, which is not how fp8 is marked.", hint=_HINT
            )
    return found


def _unmarked(header: Header, name: str) -> CheckpointUnrecognised:
    return CheckpointUnrecognised(
        f"{header.path} has {name} and no marker that names its format: ComfyUI would compute without this scale.",
        hint=_HINT,
    )
