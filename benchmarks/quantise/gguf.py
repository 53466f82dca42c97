"""Writes GGUF files as converters do: matrices in blocks, vectors in float32, and what is to stay as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.quantise.ggml_blocks import BLOCKS

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def quantise(numbers: Tensor, kind: str) -> NDArray[np.uint8]:
    """Numbers [..., columns] in blocks, [..., bytes of a row].

    Args:
        kind: a name of ggml; of columns that are a multiple of its block size.
    """
    values = numbers.detach().float().cpu().numpy()
    if kind not in BLOCKS:
        return np.asarray(quantize(values, gguf.GGMLQuantizationType[kind]))
    size, blocks = BLOCKS[kind]
    return blocks(values.reshape(-1, size)).reshape(*values.shape[:-1], -1)


def write_gguf(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    kind: str | Callable[[str], str],
    arch: str = "flux",
    keep: Callable[[str], bool] = lambda name: False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A file of ``tensors`` by name; returns its path.

    Args:
        kind: of all matrices, or of each by name. One whose rows are no whole blocks stays as it is.
        keep: names of more that stay as they are: in float32, float16 or bfloat16.
        metadata: texts to note in it.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    for name, tensor in tensors.items():
        wanted = kind(name) if callable(kind) else kind
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted]][0]
        if tensor.dim() < 2:
            writer.add_tensor(name, tensor.detach().float().cpu().numpy())
        elif keep(name) or tensor.shape[-1] % size:
            data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[_PLAIN[tensor.dtype]])
        else:
            writer.add_tensor(name, quantise(tensor, wanted), raw_dtype=gguf.GGMLQuantizationType[wanted])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
