"""`vllm serve` with the drafter, as a user starts it, on a port of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.vllm_plugin.fork_server import ROOT, engine_environment
from twotower_spec.demo.trio import trio_path

READY_WITHIN_S = 240
STOPPED_WITHIN_S = 30


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: without a path.
        model: name of the verifier in requests.
        log: file of what it has printed so far.
    """

    url: str
    model: str
    log: Path

    def get(self, path: str) -> str:
        """Body of a page."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read().decode())


@contextlib.contextmanager
def serving(log: Path, *arguments: str) -> Iterator[Server]:
    """Starts `vllm serve` on the bundled verifier, and stops it and its processes at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**engine_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(trio_path("verifier"))]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--port", str(port), *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", str(trio_path("verifier")), log)
    try:
        _wait_until_ready(server, process)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended:\n{server.log.read_text()[-4000:]}"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            server.get("/health")
            return
        time.sleep(0.5)
    raise AssertionError(f"the server was not ready in time:\n{server.log.read_text()[-4000:]}")
