"""`vllm serve` on a bundled model, forked from a process that has imported vLLM, on a port of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.vllm_plugin.fork_server import check_version, server_and_variables
from twotower_bench.servers.server import VllmServer, free_ports
from twotower_spec.demo.trio import trio_path


@contextmanager
def serving(
    *arguments: str, model: str = str(trio_path("verifier")), environment: Mapping[str, str] | None = None
) -> Iterator[VllmServer]:
    """Starts a server, and ends it and its processes, at once, in the end.

    Servers with processes that import vLLM each for themselves, as a user's, are in the tests of two engines and of the
    examples.

    Args:
        arguments: of `vllm serve`, beside those that the trio needs.
        model: that is served.
        environment: variables beside those of all engines.
    """
    fork_server, variables = server_and_variables({"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(environment or {})})
    words = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", *arguments]
    (port,) = free_ports(1)
    # Not pytest's folders: vLLM's sockets lie in it, whose paths have 107 characters at most.
    with TemporaryDirectory(prefix="serve-") as folder:
        server = VllmServer("the trio", model, words, port, Path(folder), variables, fork_server)
        try:
            server.wait_until_ready()
            check_version(json.loads(server.endpoint.get("/version"))["version"])
            yield server
        finally:
            server.kill()
