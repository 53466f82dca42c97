"""A worker in a process of its own, as ``mesh serve`` runs one, for the model of the benchmark alone."""

from __future__ import annotations

import logging
from pathlib import Path

from mesh_core.bench.processes import plugins, read_line, say, when_input_closes
from mesh_core.keys import KeyStore
from mesh_core.worker import Worker, WorkerOptions


def main() -> None:
    # That a case runs without encryption is what it is for.
    logging.basicConfig(level=logging.ERROR)
    told, installed = read_line(), plugins()
    flags = {"insecure": True} if told["insecure"] else {}
    listener = installed.transport("mesh").listen("mesh://127.0.0.1:0", **flags)
    key = "" if told["insecure"] else KeyStore().identity().client.public
    options = WorkerOptions((Path(told["model"]),), name=told["name"], client_key=key, memory=1 << 20)
    worker = Worker(options, listener, installed)
    when_input_closes(worker.stop)
    say({"address": listener.address})
    worker.serve()


if __name__ == "__main__":
    main()
