"""Which tensors the lossy codecs carry, checked in the same way at both of their ends. Must not know how they code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh_codec.base import DecodeLimits
from mesh_codec.errors import CodecCorrupt, CodecUnsupported
from mesh_codec.payload import Form, read_form

MAX_ELEMENTS = 1 << 31
"""Of a tensor: gaps between outliers are uint32, and sums of as many as there can be stay far inside int64."""


def check_lossy_form(form: Form, codec: str) -> None:
    """For an encoder of the codec of that name.

    Raises:
        CodecUnsupported: it carries no such tensor.
    """
    if not form.dtype.lossy:
        raise CodecUnsupported(f"The {codec} codec does not carry {form.dtype.name}.", hint="the raw codec")
    if form.elements > MAX_ELEMENTS:
        raise CodecUnsupported(f"A tensor of {form.elements} elements is too large to code.", hint="the raw codec")


def read_lossy_form(header: Mapping[str, Any], limits: DecodeLimits, codec: str) -> Form:
    """The form that ``header`` announces to a decoder of the codec of that name.

    Raises:
        CodecCorrupt: none, one over a limit, or one that no encoder of this codec takes.
    """
    form = read_form(header, limits)
    if not form.dtype.lossy or form.elements > MAX_ELEMENTS:
        raise CodecCorrupt(
            f"A payload announces {form.elements} elements of {form.dtype.name}, which the {codec} codec never makes."
        )
    return form
