"""A real ComfyUI as a process, driven through its HTTP interface as its own page drives it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from safetensors.torch import load_file

from tests.comfy.install import ComfyUI
from tests.support.net import free_port

ROOT = Path(__file__).parents[2]
LAUNCH = Path(__file__).with_name("launch.py")
_STARTS_WITHIN = 120.0
_RUNS_WITHIN = 240.0

Graph = dict[str, Any]


class RunFailed(Exception):
    """ComfyUI reported an error: of which node, its type and its text."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        self.node, self.kind = error.get("node_type"), error.get("exception_type")
        self.text = str(error.get("exception_message"))
        super().__init__(f"{self.node}: {self.kind}: {self.text}")


@dataclass
class Server:
    """``base`` holds models, custom_nodes and output; ``log`` what ComfyUI printed."""

    base: Path
    port: int
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    cached: set[str] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def send(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = json.dumps(body if body is not None else {}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise RunFailed({"exception_type": str(error.code), "exception_message": error.read().decode()}) from error
        return json.loads(text) if text.strip() else None

    def status(self, path: str, method: str, body: Any = None) -> int:
        """The status code of a request."""
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def answer(self, path: str, headers: Mapping[str, str], body: bytes | None = None) -> tuple[int, str]:
        """Status and text of a request with headers of its own; Host as well, if they name it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest("GET" if body is None else "POST", path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body or b"")))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def queue(self, graph: Graph) -> str:
        """Queue a prompt; its id."""
        answer: str = self.send("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})["prompt_id"]
        return answer

    def wait(self, prompt: str, within: float = _RUNS_WITHIN) -> dict[str, Any]:
        """The outputs of a prompt by node.

        Raises:
            RunFailed: a node raised, or the run was interrupted.
        """
        end = monotonic() + within
        while True:
            assert self.process.poll() is None, "ComfyUI ended:\n" + "\n".join(self.log[-30:])
            entry = self.get(f"/history/{prompt}").get(prompt)
            if entry is not None and entry["status"]["status_str"] != "":
                break
            assert monotonic() < end, f"no end within {within:.0f} s:\n" + "\n".join(self.log[-30:])
            sleep(0.02)
        for kind, detail in entry["status"]["messages"]:
            if kind == "execution_cached":
                self.cached = set(detail["nodes"])
            if kind in ("execution_error", "execution_interrupted"):
                raise RunFailed({"exception_type": kind, **detail})
        outputs: dict[str, Any] = entry["outputs"]
        return outputs

    def run(self, graph: Graph) -> dict[str, Any]:
        return self.wait(self.queue(graph))

    def latent(self, graph: Graph) -> torch.Tensor:
        """The latents that the node ``save`` of a graph wrote."""
        return self.saved(self.run(graph))

    def saved(self, outputs: Mapping[str, Any], node: str = "save") -> torch.Tensor:
        """The latents that ``node`` wrote in a run of these outputs."""
        found = outputs[node]["latents"][0]
        return load_file(self.base / "output" / found["subfolder"] / found["filename"])["latent_tensor"]

    def ran(self, node: str) -> bool:
        """Whether the run that was waited for last executed ``node``, in place of taking it from the cache."""
        return node not in self.cached

    def forget(self) -> None:
        """Have ComfyUI drop what it computed: it keeps what the last prompt consisted of, so that is another one."""
        empty = {"class_type": "EmptyLatentImage", "inputs": {"width": 16, "height": 16, "batch_size": 1}}
        save = {"class_type": "SaveLatent", "inputs": {"samples": ["empty", 0], "filename_prefix": "latents/none"}}
        self.run({"empty": empty, "nothing": save})

    def state(self, node: str) -> dict[str, Any]:
        """What the node shows."""
        found: dict[str, Any] = self.get("/mesh/status")["nodes"].get(node, {})
        return found

    def interrupt(self) -> None:
        self.send("/interrupt")

    def logged(self, text: str) -> bool:
        return any(text in line for line in list(self.log))


@contextmanager
def comfy_server(comfy: ComfyUI, base: Path, home: Path, *packs: Path) -> Iterator[Server]:
    """A server on ``base`` whose only custom nodes are ``packs``, linked as a user would clone them."""
    nodes = base / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    for pack in packs:
        if not (nodes / pack.name).exists():
            (nodes / pack.name).symlink_to(pack, target_is_directory=True)
    port = free_port()
    options = ["--cpu", "--disable-api-nodes", "--use-pytorch-cross-attention", "--base-directory", str(base)]
    quiet = ["--port", str(port), "--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
    environment = {**os.environ, "MESH_HOME": str(home), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(comfy.python), str(LAUNCH), str(comfy.folder / "main.py"), *options, *quiet],
        cwd=base,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    server = Server(base, port, process)
    threading.Thread(target=_read, args=(server,), daemon=True).start()
    try:
        end = monotonic() + _STARTS_WITHIN
        while not server.logged("To see the GUI go to"):
            assert process.poll() is None and monotonic() < end, "ComfyUI does not start:\n" + "\n".join(server.log)
            sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait(20)


def _read(server: Server) -> None:
    assert server.process.stdout is not None
    with server.process.stdout:
        for line in server.process.stdout:
            server.log.append(line.rstrip())
