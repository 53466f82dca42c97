"""The entropy codec's engine for devices: quantiser, temporal prediction and byte coder where the tensors are."""

from __future__ import annotations
