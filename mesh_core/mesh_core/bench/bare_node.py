"""A node of the bare ZeroMQ ring in a process of its own."""

from __future__ import annotations

from mesh_core.bench.processes import read_line, say
from mesh_core.transport.bare import BareNode


def main() -> None:
    keys = read_line()["keys"]
    node = BareNode((keys[0], keys[1]) if keys else None)
    say({"port": node.port})
    node.run(read_line()["following"])


if __name__ == "__main__":
    main()
