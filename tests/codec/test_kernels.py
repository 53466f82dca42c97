"""The Triton kernels, without a GPU: in Triton's interpreter against plain torch, and compiled for NVIDIA GPUs.

What they do on a GPU, ``mesh bench codec --device cuda`` checks before it times anything.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton has no package for this system"
)

INTERPRET = """
import torch
from mesh_core.bench.codec_device import check_kernels
check_kernels(torch.device("cpu"))
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mesh_codec.ans import measure_kernels, kernels

TYPES = {
    "tokens": "*bf16", "state": "*i16", "symbols": "*i8", "place": "*i64", "inverse": "*fp32", "scales": "*fp32",
    "bits": "*i16", "count": "*i64", "predicted": "*i1", "listed": "*i64",
    "data": "*u8", "total": "*i64", "deviations": "*fp64", "ranks": "*u8",
    "step": "*fp32", "floats": "*fp32", "sizes": "*fp32", "reach": "fp32", "per_mad": "fp32", "relative": "fp32",
    "cap": "fp32", "lowest": "fp32", "highest": "fp32", "largest": "fp32",
}

def check(kernel, constants, **types):
    signature = {
        name: "constexpr" if name in constants else (TYPES | types).get(name, "i32") for name in kernel.arg_names
    }
    for capability in (80, 90):
        compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))

tile = {"ROWS": 32, "COLUMNS": 64}
for held in (True, False):
    check(kernels._quantise, tile | {"HELD": held, "PERIOD": 65521}, means="*fp32")
check(kernels._restore, tile, means="*fp32")
check(kernels._checksum, {"PERIOD": 65521, "SUMMED": 4096})
check(kernels._write_listed, {"WRITTEN": 512}, elements="*i16", count="i32")
check(
    kernels._pack, {"PACKERS": 8, "PACKED": 1024, "ADDED": 128},
    rooms="*i64", sizes="*i64", statuses="*i32", words="*i64", table="*i32",
    count="i32",
)
check(kernels._tables, {"RANKED": 32, "AMONG": 512}, means="*bf16")
sampled = {"EVERY": 2, "SAMPLES": 128, "FEW": 64, "COLUMNS": 16}
check(measure_kernels._describe, sampled, means="*bf16", count="i32")
check(measure_kernels._describe, sampled | {"stride": 1}, means="*bf16", count="i32")
check(measure_kernels._settle, {"LANES": 1024, "RANKED": 32, "AMONG": 512}, means="*bf16", count="i32")
check(measure_kernels._compare, {"ROWS": 64, "COLUMNS": 16}, means="*fp32", count="i32")
"""


@pytest.mark.parametrize(("program", "interpret"), [(INTERPRET, "1"), (COMPILE, "0")], ids=["values", "compiled"])
def test_kernels(program, interpret):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
