"""A node of the bare ZeroMQ ring in a process of its own."""

from __future__ import annotations

from benchmarks.bare import BareNode
from mesh_core.bench.processes import read_line, say


def main() -> None:
    """Is told its keys, says its port, is told the port of the node that follows, and hands on."""
    keys = read_line()["keys"]
    node = BareNode((keys[0], keys[1]) if keys else None)
    say({"port": node.port})
    node.run(read_line()["following"])


if __name__ == "__main__":
    main()
