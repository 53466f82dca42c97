"""One example of each message, and its bytes as golden files beside this script.

Run it after a change of the format that comes with a new wire version, and never to make a test pass:
    python tests/data/wire/write.py
"""

from __future__ import annotations

from pathlib import Path

import msgpack

from mesh_core import wire

HERE = Path(__file__).parent
SESSION = bytes(range(16))
NEXT = bytes(range(16, 32))
KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
CHOICE = {"codec": "raw", "settings": {}}
ENTRY = {"n": "hidden", "c": "raw", "s": {}, "h": {"dtype": "bfloat16", "shape": [1, 2, 3]}, "k": 1}
HASH, DIGEST = "0123456789abcdef" * 4, "fedcba9876543210" * 4
LORA = {"id": HASH, "outline": DIGEST, "name": "turbo", "strength": 0.75, "base": 1.0}
TRACE = [{"worker": "blue", "span": "4:8", "compute_ms": 12.5, "in_coded": 12}]

EXAMPLES: list[tuple[wire.Message, list[bytes]]] = [
    (wire.Hello(1, [2], "0.1.0", {"klein": "0.1.0"}, "desk"), []),
    (
        wire.Welcome(
            1, 2, "0.1.0", {}, "blue", KEY, {"raw": {}, "quant": {"levels": 16}}, [{"device": "cuda:0"}], {"flux2": "1"}
        ),
        [],
    ),
    (wire.Enrol(2, KEY, "desk"), []),
    (wire.Enrolled(2, "blue"), []),
    (wire.Catalogue(3), []),
    (wire.Catalogued(3, [{"family": "flux2", "blocks": 32, "name": "klein"}]), []),
    (
        wire.Open(
            id=4,
            session=SESSION,
            family="flux2",
            structure="a" * 8,
            fingerprint="b" * 8,
            span=[4, 8],
            dtype="bfloat16",
            others={"norm.weight": "float32"},
            arithmetic={"fp8-scaled/F8_E4M3": "kitchen/fp8-dequant/bf16"},
            computed={"rope.freqs": HASH},
            loras=[],
            inputs={"hidden": CHOICE},
            outputs={"hidden": {"codec": "quant", "settings": {"step": 0.25}}},
            next={"address": "mesh://10.0.0.2:7777", "server_key": KEY, "session": NEXT},
            options={"guidance": True, "note": None},
        ),
        [],
    ),
    (wire.Progress(4, "loading", 10, 1 << 40), []),
    (wire.Opened(4, {"seconds": 1.5}), []),
    (wire.Admit(5, NEXT, KEY), []),
    (wire.Ok(5), []),
    (wire.Constants(6, SESSION, [{"hash": "c0ffee", **ENTRY}]), [b"text"]),
    (
        wire.Step(7, SESSION, 3, 1, 2, "cond", {"ids": "c0ffee"}, {"guidance": 3.5}, [ENTRY], TRACE, 300_000),
        [b"twelve bytes"],
    ),
    (wire.Result(7, SESSION, 3, 1, [ENTRY, {**ENTRY, "n": "empty", "k": 2}], TRACE), [b"twelve bytes", b"", b"x"]),
    (wire.Failed(8, b"", -1, "PlanError", "Span 4:99 is not in it.", "a span within :32", "blue", ""), []),
    (wire.Cancel(9, SESSION, 3), []),
    (wire.Close(10, SESSION), []),
    (wire.Ping(11, SESSION), []),
    (wire.Pong(11), []),
    (wire.Probe(12, 1 << 20), []),
    (wire.Probed(12), [b"\0" * 16]),
    (wire.ListLoras(13), []),
    (wire.LorasListed(13, [{"name": "turbo.safetensors", "bytes": 1 << 31, "trigger": "turbo"}]), []),
    (wire.Discard(14, HASH), []),
    (wire.Seek(15, "flux2", "a" * 8, [4, 8], [LORA]), []),
    (wire.Sought(15, [0]), []),
    (wire.Offer(16, HASH, DIGEST, 1 << 31, "flux2", "a" * 8, "turbo"), []),
    (wire.Offered(16, 1 << 22), []),
    (wire.Chunk(17, HASH, 1 << 22), [b"twelve bytes"]),
    (wire.Adjust(18, SESSION, [LORA, {**LORA, "id": "", "outline": "", "name": "ink"}]), []),
]


def as_msgpack(message: wire.Message, buffers: list[bytes]) -> bytes:
    """Frame 0 as msgpack writes it: another implementation than the product's."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    header = {"v": wire.VERSION, "t": wire.type_name(type(message)), **fields, "b": [len(b) for b in buffers]}
    return bytes(msgpack.packb(header))


def write() -> None:
    """Write frame 0 of each example to ``TYPE.bin``."""
    for message, buffers in EXAMPLES:
        (HERE / f"{wire.type_name(type(message))}.bin").write_bytes(as_msgpack(message, buffers))


if __name__ == "__main__":
    write()
