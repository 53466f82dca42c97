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


def _safetensors(kind: str, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    """Matrices of whole blocks in the format; the others stay as they are."""
    from safetensors.torch import save_file

    which = [
        name
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and not any(size % 64 for size in tensor.shape)
    ]
    made, notes = _written(kind, tensors, which)
    file = path.with_suffix(".safetensors")
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, file, {**metadata, **notes})
    return file


def _written(kind: str, tensors: Mapping[str, Tensor], which: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    import torch

    from benchmarks.quantise import fp8, int8, mxfp8, nvfp4

    wide = [name for name in which if "attn" not in name and "modulation" not in name]
    e5m2 = torch.float8_e5m2
    writers: dict[str, Callable[[], tuple[dict[str, Tensor], dict[str, str]]]] = {
        "fp8-e4m3": lambda: (fp8.fp8_cast(tensors, tensors), {}),
        "fp8-e5m2": lambda: (fp8.fp8_cast(tensors, tensors, e5m2), {}),
        "fp8-scaled": lambda: fp8.fp8_scaled(tensors, which),
        "fp8-scaled-metadata": lambda: fp8.fp8_scaled(tensors, which, "metadata"),
        "fp8-scaled-old": lambda: fp8.fp8_scaled(tensors, which, "old"),
        "fp8-scaled-e5m2": lambda: fp8.fp8_scaled(tensors, which, dtype=e5m2),
        "fp8-mixed": lambda: fp8.fp8_scaled(tensors, wide, "metadata", input_scales=dict.fromkeys(wide, 0.5)),
        "fp8-row": lambda: fp8.fp8_rows(tensors, which),
        "nvfp4": lambda: nvfp4.quantise(tensors, which),
        "mxfp8": lambda: mxfp8.quantise(tensors, which),
        "int8": lambda: int8.quantise(tensors, which),
        "int8-rows": lambda: int8.quantise(tensors, which, per_row=True),
        "int8-convrot": lambda: int8.quantise(tensors, which, group=64),
    }
    return writers[kind]()


SAFETENSORS_KINDS = (
    *("fp8-e4m3", "fp8-e5m2", "fp8-scaled", "fp8-scaled-metadata", "fp8-scaled-old", "fp8-scaled-e5m2", "fp8-mixed"),
    *("fp8-row", "nvfp4", "mxfp8", "int8", "int8-rows", "int8-convrot"),
)

WRITERS: dict[str, Writer] = {
    **{kind: partial(_gguf, kind) for kind in GGUF_KINDS},
    **{kind: partial(_safetensors, kind) for kind in SAFETENSORS_KINDS},
}
