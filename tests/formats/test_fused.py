"""Kernels that make numbers of stored weights, without a GPU: in Triton's interpreter beside plain torch, and compiled.

On a GPU they are compared by ``python -m benchmarks.quantised_on_gpu kernels``.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys

import pytest
import torch

from benchmarks.quantised.parts import random_parts
from mesh_core.formats import fused
from mesh_core.formats.fp8_scaled import Fp8ScaledFormat

on_linux = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton has no package for this system"
)

INTERPRET = """
import torch
from benchmarks.quantised.exactness import compared, refused
from mesh_core.formats import fused
fused._on_gpu = lambda codes: True
rows = compared(torch.device("cpu"), ((33, 768),))
assert not [row for row in rows if row["different"]], rows
assert not refused() and sorted({key[0] for key in fused._works}) == sorted(fused._KERNELS)
assert len(rows) == 3 * (2 * 2 + 2 + 1 + 2 + 8)
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mesh_core.formats import kernels

TYPES = {"codes": "*u8", "halves": "*fp16", "scales": "*fp32", "block_scales": "*u8"}

def check(kernel, **constants):
    for capability, numbers in ((80, "*bf16"), (80, "*i16"), (90, "*bf16"), (90, "*fp16")):
        types = TYPES | {"numbers": numbers}
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        source, target = ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32)
        code = compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
        # A product that is not rounded on its own, and numbers that are too small for an exponent of their own.
        assert "fma." not in code and ".ftz" not in code, (kernel, code)

for once in (True, False):
    check(kernels._fp8, E5M2=once, SCALED=True, BY_ROW=once, ONCE=once, COLUMNS=2048)
    check(kernels._nvfp4, ONCE=once, BLOCKS=128)
check(kernels._ggml_small, SIZE=24, OFFSET=True, FIFTH=True, BLOCKS=64)
check(kernels._ggml_q8_0, BLOCKS=64)
check(kernels._ggml_k, SIZE=176, FIFTH=True, BLOCKS=8)
check(kernels._ggml_q6_k, BLOCKS=8)
"""


@on_linux
@pytest.mark.parametrize(("program", "interpret"), [(INTERPRET, "1"), (COMPILE, "0")], ids=["values", "compiled"])
def test_kernels(program: str, interpret: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("fault", [ImportError("No module named 'triton'"), RuntimeError("no C compiler"), None])
def test_without_working_kernels_plain_torch_goes_on(
    fault: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(kernels: object, parts: object, numbers: torch.Tensor) -> None:
        if fault is not None:
            raise fault
        numbers.zero_()

    monkeypatch.setattr(fused, "_on_gpu", lambda codes: True)
    monkeypatch.setattr(fused, "_KERNELS", {"fp8": broken, "fp8-once": broken})
    monkeypatch.setattr(fused, "_kernels", lambda: None)
    monkeypatch.setattr(fused, "_works", {})
    monkeypatch.setattr(fused, "_said", set())
    format, parts = Fp8ScaledFormat(), random_parts("fp8-scaled/F8_E4M3", 100, 64, "cpu")
    expected = parts["codes"].bfloat16() * parts["scale"].bfloat16()
    with caplog.at_level(logging.INFO, logger="mesh_core"):
        for _ in range(3):
            made = format.dequantise(parts, "F8_E4M3", (100, 64), torch.bfloat16, "kitchen/fp8-dequant/bf16")
            assert torch.equal(made, expected)
    (line,) = caplog.messages
    assert "plain torch" in line and (str(fault) in line if fault else "of fp8 make other bits" in line)


def test_memory_that_runs_out_does_not_end_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    full = True

    def kernel(kernels: object, parts: dict[str, torch.Tensor], numbers: torch.Tensor) -> None:
        if full:
            raise torch.OutOfMemoryError("out of memory")
        numbers.copy_(parts["codes"].to(numbers.dtype))

    monkeypatch.setattr(fused, "_on_gpu", lambda codes: True)
    monkeypatch.setattr(fused, "_KERNELS", {"fp8": kernel})
    monkeypatch.setattr(fused, "_kernels", lambda: None)
    monkeypatch.setattr(fused, "_works", {})
    parts = random_parts("fp8-cast/F8_E4M3", 8, 16, "cpu")

    def plain(parts: fused.Parts) -> torch.Tensor:
        return parts["codes"].to(torch.float16)

    with pytest.raises(torch.OutOfMemoryError):
        fused.numbers("fp8", parts, (8, 16), torch.float16, plain)
    full = False
    made = fused.numbers("fp8", parts, (8, 16), torch.float16, plain)
    assert torch.equal(made, plain(parts)) and list(fused._works.values()) == [True]
