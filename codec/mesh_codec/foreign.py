"""Turns what a vendor's library raises into a codec error, in one place. Must not know which library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mesh_codec.errors import CodecError


@contextmanager
def named(kind: type[CodecError], what: str) -> Iterator[None]:
    """Bindings of drivers raise classes of their own, straight from Exception: any of them becomes ``kind``."""
    try:
        yield
    except CodecError:
        raise
    except Exception as error:
        raise kind(f"{what}: {str(error)[:300] or type(error).__name__}") from error
