"""A worker in a process of its own, as ``mesh serve`` runs one, for the models of the benchmark alone."""

from __future__ import annotations

import logging
from pathlib import Path

from mesh_core.bench.processes import plugins, read_line, say, when_input_closes
from mesh_core.builtin import load_plugins
from mesh_core.system.logs import start_logging
from mesh_core.transport.keys import KeyStore
from mesh_core.worker.server import Worker, WorkerOptions


def main() -> None:
    """Serve until the input closes.

    Is told ``model``, ``name`` and ``insecure``; perhaps ``bind``, ``memory`` in bytes, ``installed`` to use all
    plugins of the environment, ``survey`` to measure its codecs before it says its ``address``.
    """
    # That a case runs without encryption is what it is for.
    start_logging(logging.ERROR)
    told = read_line()
    installed = load_plugins() if told.get("installed") else plugins()
    flags = {"insecure": True} if told["insecure"] else {}
    listener = installed.transport("mesh").listen(f"mesh://{told.get('bind', '127.0.0.1')}:0", **flags)
    key = "" if told["insecure"] else KeyStore().identity().client.public
    options = WorkerOptions(
        (Path(told["model"]),), name=told["name"], client_key=key, memory=told.get("memory", 1 << 20)
    )
    worker = Worker(options, listener, installed)
    if told.get("survey"):
        # Else it would take the processor from the host that measures too.
        worker.speeds.survey(installed.codecs().values())
    when_input_closes(worker.stop)
    say({"address": listener.address})
    worker.serve()


if __name__ == "__main__":
    main()
