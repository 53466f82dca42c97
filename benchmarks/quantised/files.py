"""Checkpoints of real size with random weights, in the layouts that people download: written once, in one stream.

Their names and fused tensors come from the family's own description of its single files. Tensors are pieces of one
block of random numbers for each type, each beginning elsewhere in it: what takes time is the disk alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quantised.parts import random_parts
from benchmarks.split_on_gpu import empty_model
from mesh_codec.memory import bytes_of
from mesh_core.builtin import installed_plugins
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import Checkpoint, recognise

Shapes = dict[str, tuple[int, ...]]

_SLACK = 1 << 20
_STEP = 144 * 16 * 7
"""Bytes between the beginnings of tensors: whole blocks of ggml, whole numbers of any type."""


@dataclass(frozen=True)
class Layout:
    """How a file of some model is written.

    Attributes:
        ending: of the file's name.
        stored: whether a matrix is quantised, by its name in the file.
        kind: ``F8_E4M3`` or a kind of ggml.
    """

    ending: str
    kind: str
    stored: Callable[[str], bool]


def _in_blocks(name: str) -> bool:
    return any(f"{stack}blocks." in name for stack in ("double_", "single_", "transformer_"))


def _mixed(name: str) -> bool:
    return "_mlp." in name or "single_blocks." in name


LAYOUTS: Mapping[str, Layout] = {
    "fp8mixed": Layout("safetensors", "F8_E4M3", _mixed),
    "fp8": Layout("safetensors", "F8_E4M3", _in_blocks),
    "Q4_K": Layout("gguf", "Q4_K", lambda name: _in_blocks(name) or "modulation" in name),
    "Q8_0": Layout("gguf", "Q8_0", lambda name: _in_blocks(name) or "modulation" in name),
}
"""By what people call them. fp8mixed: attention, modulation and embedders of FLUX.2 stay in bfloat16."""


def checkpoint_file(geometry: str, layout: str, folder: Path, device: torch.device, **others: Any) -> Checkpoint:
    """The checkpoint of that geometry in ``folder/models``, written there if it is not yet.

    Args:
        others: arguments of the model class in place of the geometry's.
    """
    chosen = LAYOUTS[layout]
    name = "-".join([geometry, layout, *(str(value) for value in others.values())])
    file = folder / "models" / f"{name}.{chosen.ending}"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        shapes = _single_file(geometry, folder / f"{name}-shapes", others)
        part = file.with_name(f"{file.name}.part")
        (_write_gguf if chosen.ending == "gguf" else _write_safetensors)(part, shapes, chosen, device)
        part.rename(file)
    return recognise(read_header(file), installed_plugins())


def _single_file(geometry: str, folder: Path, others: Mapping[str, Any]) -> Shapes:
    """The tensors that a single file of the geometry has; ``folder`` gets a checkpoint that is all holes."""
    model, offset, header = empty_model(geometry, **others), 0, {}
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    for name, parameter in model.named_parameters():
        size = parameter.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, offset + size]}
        offset += size
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as stream:
        stream.truncate(_write_header(stream, header) + offset)
    spec, adapter = (found := recognise(read_header(folder), installed_plugins())).spec, found.adapter
    layout = next(one for one in adapter.layouts(spec) if one.keys() >= spec.parameters.keys())
    shapes: Shapes = {}
    for name, parameter in spec.parameters.items():
        for piece in layout[name]:
            rows = parameter.shape[0] if piece.stop is None else piece.stop
            rows = max(rows, shapes.get(piece.tensor, (0,))[0])
            shapes[piece.tensor] = (rows, *parameter.shape[1:])
    return shapes


def _write_header(stream: Any, header: Mapping[str, Any]) -> int:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    return 8 + len(text)


class _Random:
    """Bytes of random numbers of one type, that last as long as they are needed."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._bytes, self._step = np.frombuffer(bytes_of(numbers.cpu().contiguous()), np.uint8), 0

    def take(self, size: int) -> NDArray[np.uint8]:
        room = len(self._bytes) - size
        assert room >= 0
        self._step += 1
        at = self._step % (room // _STEP + 1) * _STEP
        return self._bytes[at : at + size]


def _sources(shapes: Shapes, chosen: Layout, device: torch.device) -> tuple[_Random, _Random]:
    """Codes, and numbers in bfloat16."""
    matrices = {n for n, s in shapes.items() if len(s) == 2 and n.endswith(".weight") and chosen.stored(n)}
    most = max((prod(shapes[n]) for n in matrices), default=0) + _SLACK
    columns = max((shapes[n][1] for n in matrices), default=256)
    label = f"gguf/{chosen.kind}" if chosen.ending == "gguf" else f"fp8-cast/{chosen.kind}"
    codes = random_parts(label, -(-most // columns), columns, device)["codes"].view(torch.uint8)
    most = max(prod(s) for n, s in shapes.items() if n not in matrices) + _SLACK
    generator = torch.Generator(device).manual_seed(5)
    numbers = torch.randn(most, generator=generator, device=device, dtype=torch.float32) * 0.0077
    return _Random(codes), _Random(numbers.bfloat16().view(torch.uint8))


def _is_stored(name: str, shape: tuple[int, ...], chosen: Layout) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and chosen.stored(name)


def _is_norm(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 and "norm" in name


def _write_safetensors(file: Path, shapes: Shapes, chosen: Layout, device: torch.device) -> None:
    codes, numbers = _sources(shapes, chosen, device)
    header: dict[str, Any] = {}
    data: list[NDArray[np.uint8]] = []
    layers, offset = {}, 0

    def add(name: str, dtype: str, shape: tuple[int, ...], content: NDArray[np.uint8]) -> None:
        nonlocal offset
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(content)]}
        data.append(content)
        offset += len(content)

    def scalar(value: float) -> NDArray[np.uint8]:
        return np.frombuffer(np.float32(value).tobytes(), np.uint8)

    for name, shape in shapes.items():
        if _is_stored(name, shape, chosen):
            layer = name.removesuffix(".weight")
            add(name, chosen.kind, shape, codes.take(prod(shape)))
            add(f"{layer}.weight_scale", "F32", (), scalar(0.6 / shape[1] ** 0.5))
            add(f"{layer}.input_scale", "F32", (), scalar(1 / 64))
            layers[layer] = {"format": "float8_e4m3fn"}
        elif _is_norm(name, shape):
            add(name, "BF16", shape, np.frombuffer(bytes_of(torch.ones(shape, dtype=torch.bfloat16)), np.uint8))
        else:
            add(name, "BF16", shape, numbers.take(2 * prod(shape)))
    header["__metadata__"] = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    with file.open("wb") as stream:
        _write_header(stream, header)
        for content in data:
            stream.write(memoryview(content))


def _write_gguf(file: Path, shapes: Shapes, chosen: Layout, device: torch.device) -> None:
    import gguf

    codes, numbers = _sources(shapes, chosen, device)
    kind = gguf.GGMLQuantizationType[chosen.kind]
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(file, "flux")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, shape in shapes.items():
        if _is_stored(name, shape, chosen) and shape[1] % size == 0:
            row = shape[1] // size * nbytes
            writer.add_tensor(name, codes.take(shape[0] * row).reshape(shape[0], row), raw_dtype=kind)
        elif len(shape) == 1:
            made = np.ones(shape, np.float32) if _is_norm(name, shape) else np.zeros(shape, np.float32)
            writer.add_tensor(name, made)
        else:
            content = numbers.take(2 * prod(shape)).reshape(*shape[:-1], -1)
            writer.add_tensor(name, content, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
