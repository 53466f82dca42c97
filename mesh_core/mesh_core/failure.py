"""Errors across the wire: an exception as the fields of a ``failed`` message, and back."""

from __future__ import annotations

import traceback
from typing import Any

import mesh_codec.errors as codec_errors
from mesh_codec.errors import CodecError
from mesh_core import wire
from mesh_core.errors import MAX_RENDERED, MeshError, RemoteError, by_name


def describe(error: BaseException) -> dict[str, Any]:
    """``error`` as plain values of bounded size. The traceback is only that of errors nobody foresaw."""
    if isinstance(error, (MeshError, CodecError)):
        message, hint, trace = error.message, error.hint, ""
    else:
        message, hint = str(error) or type(error).__name__, ""
        trace = "".join(traceback.format_exception(error))[-MAX_RENDERED:]
    return {
        "error": type(error).__name__,
        "message": message[:MAX_RENDERED],
        "hint": hint[:MAX_RENDERED],
        "traceback": trace,
    }


def rebuild(failed: wire.Failed) -> Exception:
    """The exception that a ``failed`` message stands for, naming the worker that failed."""
    where = f"Worker {failed.worker}: " if failed.worker else ""
    codec_kind = getattr(codec_errors, failed.error, None)
    if isinstance(codec_kind, type) and issubclass(codec_kind, CodecError):
        return codec_kind(where + failed.message, hint=failed.hint)
    kind = by_name(failed.error)
    if kind is not RemoteError:
        return kind(where + failed.message, hint=failed.hint)
    hint = failed.hint or "the worker's log, and mesh doctor"
    text = f"{where}{failed.error}: {failed.message}"
    return RemoteError(text, hint=hint, worker=failed.worker, remote_traceback=failed.traceback)
