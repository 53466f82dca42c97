"""Every format in which a model is written for tests and tables, by the name that people know it by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

Writer = Callable[[Mapping[str, Tensor], Path, Mapping[str, str]], Path]
"""(tensors under the authors' names, path without an ending, metadata of the file) -> the file that was written."""

GGUF_KINDS = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K")


def _gguf(kind: str, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    from benchmarks.quantise.gguf import write_gguf

    return write_gguf(path.with_suffix(".gguf"), tensors, kind, metadata=metadata)


def _comfy(kind: str, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    """As ComfyUI writes it: matrices of whole blocks, named in the header."""
    from safetensors.torch import save_file

    from benchmarks.quantise import int8, mxfp8, nvfp4

    which = [
        name
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and not any(size % 64 for size in tensor.shape)
    ]
    made, notes = {
        "nvfp4": nvfp4.quantise,
        "mxfp8": mxfp8.quantise,
        "int8": int8.quantise,
        "int8-rows": partial(int8.quantise, per_row=True),
        "int8-convrot": partial(int8.quantise, group=64),
    }[kind](tensors, which)
    file = path.with_suffix(".safetensors")
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, file, {**metadata, **notes})
    return file


WRITERS: dict[str, Writer] = {kind: partial(_gguf, kind) for kind in GGUF_KINDS}
WRITERS |= {kind: partial(_comfy, kind) for kind in ("nvfp4", "mxfp8", "int8", "int8-rows", "int8-convrot")}
