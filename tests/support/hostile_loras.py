"""Files that pose as LoRAs and ask for more than they are large."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from mesh_core.loras.lora import Lora
from mesh_core.loras.part import Part

MB = 1 << 20


def file_of(head: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(head)) + head + data


def rewritten(lora: Lora, change: Callable[[list[Any], dict[str, Any]], None]) -> bytes:
    """The file of a LoRA after ``change`` had its patches and its head."""
    whole = Part(lora).read(0, Part(lora).nbytes)
    length = struct.unpack("<Q", whole[:8])[0]
    head = json.loads(whole[8 : 8 + length])
    patches = json.loads(head["__metadata__"]["patches"])
    change(patches, head)
    head["__metadata__"]["patches"] = json.dumps(patches)
    return file_of(json.dumps(head).encode(), whole[8 + length :])


def names(count: int, value: str) -> bytes:
    return ("{" + ",".join(f'"{i:x}":{value}' for i in range(count)) + "}").encode()
