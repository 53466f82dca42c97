"""Errors across the wire: an exception as the fields of a ``failed`` message, and back."""

from __future__ import annotations

import traceback
from typing import Any

import mesh_codec.errors as codec_errors
from mesh_codec.errors import CodecError
from mesh_core import wire
from mesh_core.errors import MAX_RENDERED, MeshError, RemoteError, TransportError, by_name
from mesh_core.system.handles import EXHAUSTED, EXHAUSTED_HINT
from mesh_core.visible import visible_lines

_LONGEST_NAME = 256


def describe(error: BaseException) -> dict[str, Any]:
    """``error`` as plain values of bounded size. The traceback is only that of errors nobody foresaw."""
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        error = TransportError(f"This worker has too many files and connections open: {error}.", hint=EXHAUSTED_HINT)
    if isinstance(error, (MeshError, CodecError)):
        message, hint, trace = error.message, error.hint, ""
    else:
        message, hint = str(error) or type(error).__name__, ""
        trace = "".join(traceback.format_exception(error))[-MAX_RENDERED:]
    texts = {"message": message[:MAX_RENDERED], "hint": hint[:MAX_RENDERED], "traceback": trace}
    # A file name that is no UTF-8 holds surrogates, which the wire refuses: its failure would not be told to anyone.
    readable = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in texts.items()}
    return {"error": type(error).__name__[:_LONGEST_NAME], **readable}


def rebuild(failed: wire.Failed) -> Exception:
    """The exception that a ``failed`` message stands for, naming the worker that failed."""
    where = f"Worker {failed.worker}: " if failed.worker else ""
    codec_kind = getattr(codec_errors, failed.error, None)
    if isinstance(codec_kind, type) and issubclass(codec_kind, CodecError):
        # The codecs' errors know nothing of terminals: what comes from elsewhere is made visible before it is theirs.
        return codec_kind(visible_lines(where + failed.message), hint=visible_lines(failed.hint))
    kind = by_name(failed.error)
    if kind is not RemoteError:
        return kind(where + failed.message, hint=failed.hint)
    text = f"{where}{failed.error}: {failed.message}"
    return RemoteError(text, hint=failed.hint, worker=failed.worker, remote_traceback=failed.traceback)
