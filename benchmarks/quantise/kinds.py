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


WRITERS: dict[str, Writer] = {kind: partial(_gguf, kind) for kind in GGUF_KINDS}
