"""`vllm serve` on the bundled verifier, forked from a process that has imported vLLM, on a port of its own."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.vllm_plugin.fork_server import fork
from twotower_bench.engines.fork_server import ForkedProcess
from twotower_bench.servers.server import HOST, Endpoint, free_ports
from twotower_spec.demo.trio import trio_path

READY_WITHIN_S = 300.0


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    endpoint: Endpoint
    log: Path


@contextmanager
def serving(*arguments: str) -> Iterator[RunningServer]:
    """Starts a server, and stops it and its processes at the end.

    Servers with processes that import vLLM each for themselves, as a user's, are in the tests of `bench serve` and of
    the examples.

    Args:
        arguments: of `vllm serve`, beside those that the trio needs.
    """
    verifier, (port,) = str(trio_path("verifier")), free_ports(1)
    words = ["serve", verifier, "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", *arguments]
    words += ["--host", HOST, "--port", str(port)]
    # Not pytest's folders: vLLM's sockets lie in it, whose paths have 107 characters at most.
    with TemporaryDirectory(prefix="serve-") as name:
        folder, environment = Path(name), {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        process = fork("tests.vllm_plugin.server:run_vllm", *words, folder=folder, environment=environment)
        with closing(process):
            server = RunningServer(Endpoint(f"http://{HOST}:{port}", verifier, verifier), folder / "log")
            _wait_until_ready(server, process)
            yield server


def _wait_until_ready(server: RunningServer, process: ForkedProcess) -> None:
    end = time.monotonic() + READY_WITHIN_S
    while not server.endpoint.is_ready():
        if time.monotonic() > end:
            raise process.failure(f"was not ready after {READY_WITHIN_S:.0f} s")
        time.sleep(0.3)


def run_vllm(*words: str) -> None:
    """Does what the command `vllm` does with these words; its engine is forked as well."""
    fork_engine_cores()
    sys.argv = ["vllm", *words]
    from vllm.entrypoints.cli.main import main

    main()


def fork_engine_cores() -> None:
    """Lets vLLM fork where it would spawn, in this process.

    On a CPU it spawns the engine's process, which then imports vLLM anew.
    """
    get_context = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return get_context("fork" if method == "spawn" else method)

    multiprocessing.get_context = forking  # type: ignore[assignment]
