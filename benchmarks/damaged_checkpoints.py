"""Damage to checkpoint files in any format: one kind of it at a time, chosen by a seed.

A file is taken apart into its tensors and metadata, changed there, and put together again as its writer would do it, so
that damage gets past the checks of sizes and places; some kinds lie about those as well, or change bytes.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from mesh_core.model.checkpoint import read_header
from mesh_core.model.gguf import _PLAIN, DTYPE_PREFIX, QUANTISED

_GGML = {t.name: t for t in (*_PLAIN.values(), *QUANTISED.values())}
_ITEM = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_TYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "U8", "I8", "F8_E8M0", "F64", "I64", "BOOL", "F4", "C64", "")
_LEAVES = ("weight", "weight_scale", "weight_scale_2", "scale_weight", "input_scale", "scale_input", "comfy_quant")
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise", "w4a8", "", None, 3, {}, "F8_E4M3")
_OPTIONS = ("convrot", "convrot_groupsize", "per_row", "full_precision_matrix_mult", "params", "group", "format")
_VALUES = (True, False, None, 0, 1, -4, 4, 64, 256, 1 << 70, 1.5, "x", "y" * 70, {}, {"convrot": True}, [1])
_SIZES = (0, 1, 2, 3, 16, 31, 64, 128, 256, 257, 1 << 20, 1 << 31, 1 << 40, (1 << 62) + 1, (1 << 63) - 1)
_FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1e-45, 3.4e38, 1.0)
_NOTE = "_quantization_metadata"


@dataclass
class Entry:
    """A tensor. ``dtype`` as safetensors names it, or ggml's name; ``shape`` rows first."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def fitted(self, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Entry:
        """Of another type or shape, with as much data as that takes where that is little."""
        made = replace(self, dtype=self.dtype if dtype is None else dtype, shape=self.shape if shape is None else shape)
        type, count = _GGML.get(made.dtype), prod(made.shape)
        size = count * _ITEM.get(made.dtype, 1) if type is None else count // type.block_size * type.block_bytes
        if size <= 1 << 22:
            made.data = (self.data * (size // max(1, len(self.data)) + 1))[:size].ljust(size, b"\0")
        return made


@dataclass
class Parsed:
    """What a file holds; ``lies`` are what it says besides of offsets (by tensor) and of counts (by number)."""

    gguf: bool
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    lies: dict[str | int, int] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    def copy(self) -> Parsed:
        return Parsed(self.gguf, dict(self.tensors), dict(self.metadata))

    def content(self) -> bytes:
        """The file."""
        return _gguf(self) if self.gguf else _safetensors(self)


def parsed(file: Path) -> Parsed:
    """An intact file."""
    header, content = read_header(file), file.read_bytes()
    return Parsed(
        content[:4] == b"GGUF",
        {
            name: Entry(t.dtype.removeprefix(DTYPE_PREFIX), t.shape, content[t.offset : t.offset + t.nbytes])
            for name, t in header.tensors.items()
        },
        dict(header.metadata),
    )


def _safetensors(made: Parsed) -> bytes:
    entries, place = [], 0
    for name, entry in made.tensors.items():
        begin = made.lies.get(name, place)
        said = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, begin + len(entry.data)]}
        entries += [f"{json.dumps(name)}: {json.dumps(said)}"] * (1 + made.twice.count(name))
        place += len(entry.data)
    header = f'{{"__metadata__": {json.dumps(made.metadata)}, {", ".join(entries)}}}'.encode("utf-8", "replace")
    return b"".join([struct.pack("<Q", len(header)), header, *(e.data for e in made.tensors.values())])


def _text(value: str) -> bytes:
    content = value.encode("utf-8", "replace")
    return struct.pack("<Q", len(content)) + content


def _gguf(made: Parsed) -> bytes:
    lies, body, data = made.lies, [], bytearray()
    for key, value in made.metadata.items():
        number = value.isdecimal() and len(value) < 10
        body.append(_text(key) + (struct.pack("<II", 4, int(value)) if number else struct.pack("<I", 8) + _text(value)))
    for name, entry in made.tensors.items():
        dims = [size & (1 << 64) - 1 for size in reversed(entry.shape)]
        type = _GGML[entry.dtype].number if entry.dtype in _GGML else 99
        said = _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type, lies.get(name, len(data)))
        body += [said] * (1 + made.twice.count(name))
        data += entry.data + bytes(-len(entry.data) % 32)
    counts = lies.get(0, len(made.tensors) + len(made.twice)), lies.get(1, len(made.metadata))
    header = b"GGUF" + struct.pack("<IQQ", lies.get(2, 3), *counts) + b"".join(body)
    return header + bytes(-len(header) % 32) + bytes(data)


def _pick(made: Parsed, r: random.Random) -> str:
    """A tensor; as often as not one that is no weight."""
    names = list(made.tensors)
    beside = [name for name in names if name.rpartition(".")[2] in _LEAVES[1:] or name.endswith("scaled_fp8")]
    return r.choice(beside if beside and r.random() < 0.5 else names)


def drop(made: Parsed, other: Parsed, r: random.Random) -> None:
    del made.tensors[_pick(made, r)]


def double(made: Parsed, other: Parsed, r: random.Random) -> None:
    """A tensor under a second name, or its entry twice."""
    name = _pick(made, r)
    if r.random() < 0.2:
        made.twice.append(name)
    else:
        made.tensors[_renamed(made, name, r)] = made.tensors[name]


def move(made: Parsed, other: Parsed, r: random.Random) -> None:
    """A tensor to another name, or two to each other's."""
    name, second = _pick(made, r), _pick(made, r)
    if r.random() < 0.5:
        made.tensors[name], made.tensors[second] = made.tensors[second], made.tensors[name]
    else:
        made.tensors[_renamed(made, name, r)] = made.tensors.pop(name)


def _renamed(made: Parsed, name: str, r: random.Random) -> str:
    layer, _, leaf = name.rpartition(".")
    others = [n.rpartition(".")[0] for n in made.tensors]
    ways = (f"{layer}.{r.choice(_LEAVES)}", f"{r.choice(others)}.{leaf}", f"{name}{r.choice(('_scale', '_2', '.'))}")
    return r.choice((*ways, f"model.{name}", r.choice(("", "scaled_fp8", ".weight", "\0", "é" * 300))))


def shape(made: Parsed, other: Parsed, r: random.Random) -> None:
    name = _pick(made, r)
    old = list(made.tensors[name].shape)
    way = r.randrange(5)
    if way == 0 and old:
        old[r.randrange(len(old))] = r.choice(_SIZES)
    elif way == 1:
        old = [r.choice(_SIZES) for _ in range(r.choice((0, 1, 2, 3, 4, 5, 17)))]
    elif way == 2:
        old = old[::-1]
    elif way == 3:
        old.insert(r.randint(0, len(old)), r.choice((0, 1, 2)))
    else:
        old = [prod(old)]
    given = made.tensors[name]
    made.tensors[name] = given.fitted(shape=tuple(old)) if r.random() < 0.8 else replace(given, shape=tuple(old))


def type_(made: Parsed, other: Parsed, r: random.Random) -> None:
    name = _pick(made, r)
    wanted, given = r.choice((*_GGML, "?") if made.gguf else _TYPES), made.tensors[name]
    made.tensors[name] = given.fitted(dtype=wanted) if r.random() < 0.8 else replace(given, dtype=wanted)


def scales(made: Parsed, other: Parsed, r: random.Random) -> None:
    """Numbers of a tensor that cannot be scales."""
    name = _pick(made, r)
    form, data = r.choice(("<f", "<e", "B")), bytearray(made.tensors[name].data)
    for _ in range(r.randint(1, 4)):
        value = r.choice(_FLOATS)
        if form == "<e" and abs(value) > 65504 and value != float("inf"):
            value = float("nan")
        new = struct.pack(form, r.choice((0, 0x7E, 0x7F, 0x80, 0xFE, 0xFF)) if form == "B" else value)
        places = len(data) // len(new)
        if places:
            at = r.randrange(places) * len(new)
            data[at : at + len(new)] = new
    made.tensors[name] = replace(made.tensors[name], data=bytes(data))


def noise(made: Parsed, other: Parsed, r: random.Random) -> None:
    name = _pick(made, r)
    made.tensors[name] = replace(made.tensors[name], data=r.randbytes(len(made.tensors[name].data)))


def marker(made: Parsed, other: Parsed, r: random.Random) -> None:
    """What is said of a layer, in either place, or an old marker."""
    layer = _pick(made, r).rpartition(".")[0]
    said: object = {"format": r.choice(_FORMATS)}
    for _ in range(r.randint(0, 2)):
        said |= {r.choice(_OPTIONS): r.choice(_VALUES)}  # type: ignore[operator]
    text = json.dumps(r.choice((said, said, said, [], "nvfp4", None)))
    text = r.choice((text, text, text, text[:-1], "{" * 3000, " " * 5000, '{"format": "\ud800"}'))
    way = r.randrange(4)
    if way == 0:
        try:
            layers = {**json.loads(made.metadata[_NOTE])["layers"], layer: said}
        except (KeyError, TypeError, ValueError):
            layers = {layer: said}
        made.metadata[_NOTE] = json.dumps({"format_version": r.choice(("1.0", 1.0, "2", None)), "layers": layers})
    elif way == 1:
        made.metadata[_NOTE] = text
    elif way == 2 and not made.gguf:
        count = r.choice((0, 1, 2, 3))
        made.tensors[r.choice(("", f"{layer}.")) + "scaled_fp8"] = Entry(r.choice(_TYPES), (0,), b"").fitted(
            shape=(count,)
        )
    else:
        content = text.encode("utf-8", "replace")
        made.tensors[f"{layer}.comfy_quant"] = Entry("I8" if made.gguf else "U8", (len(content),), content)


def dialect(made: Parsed, other: Parsed, r: random.Random) -> None:
    """Some layers, or all but some, as another format has them; its notes too."""
    layers = sorted({name.rpartition(".")[0] for name in made.tensors})
    for layer in r.sample(layers, r.randint(1, min(6, len(layers)))):
        for name in [n for n in made.tensors if n.rpartition(".")[0] == layer]:
            if r.random() < 0.9:
                del made.tensors[name]
        for name, entry in other.tensors.items():
            if name.rpartition(".")[0] == layer and made.gguf == other.gguf:
                made.tensors[name] = entry
    if r.random() < 0.5:
        made.metadata |= other.metadata


def notes(made: Parsed, other: Parsed, r: random.Random) -> None:
    """Metadata."""
    keys = ("general.alignment", "general.quantization_version", "split.count", _NOTE, "config", "format", "model_type")
    for _ in range(r.randint(1, 3)):
        key = r.choice((*keys, *made.metadata, f"comfy.gguf.orig_shape.{_pick(made, r)}"))
        made.metadata[key] = r.choice(("", "0", "1", "2", "3", "64", "{}", "[]", '{"layers": {}}', "x" * 5000, "null"))


def places(made: Parsed, other: Parsed, r: random.Random) -> None:
    """Offsets, and how many there are of what."""
    limit = sum(len(e.data) for e in made.tensors.values())
    made.lies[_pick(made, r)] = r.choice((0, 32, 33, limit, limit + 32, 1 << 40, (1 << 64) - 1))
    if made.gguf and r.random() < 0.7:
        made.lies = {r.choice((0, 1, 2)): r.choice((0, 1, 2, 4, 50, 100, 99_999, 100_001, (1 << 32) - 1))}


Damage = Callable[[Parsed, Parsed, random.Random], None]
"""Changes the first; the second is the same model in another format."""

KINDS: dict[str, Damage] = {
    "drop": drop,
    "double": double,
    "move": move,
    "shape": shape,
    "type": type_,
    "scales": scales,
    "noise": noise,
    "marker": marker,
    "dialect": dialect,
    "notes": notes,
    "places": places,
}

CONFIGURED = (
    *(None, True, False, 0, 1, 2, -1, 3.5, float("nan"), float("inf"), 1e300, 128, 1 << 20, 10**9, 10**400, "x", ""),
    *([], [8, 8], [32] * 4, [None], {}, {"quant_method": "bfl"}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
)
"""What a ``config.json`` may say of anything."""

BYTES = ("flipped", "cut", "longer", "replaced")


def damaged_bytes(content: bytes, how: str, r: random.Random) -> bytes:
    """``content`` with bytes changed, most of them near its start, or with another end."""
    made, near = bytearray(content), min(len(content), 12_000)
    if how == "cut":
        return bytes(made[: r.choice((r.randrange(near), r.randrange(len(made))))])
    if how == "longer":
        return bytes(made + r.randbytes(r.choice((1, 31, 32, 4096))))
    for _ in range(r.randint(1, 4)):
        at = r.randrange(r.choice((16, near, near, len(made))))
        if how == "flipped":
            made[at] ^= 1 << r.randrange(8)
        else:
            new = r.randbytes(r.randint(1, 8)) if r.random() < 0.5 else r.choice((b"\xff" * 8, bytes(8), b'{"":[1e9}'))
            made[at : at + len(new)] = new
    return bytes(made[: len(content)])
