"""`vllm serve` on the bundled verifier, as a user starts it, on a port of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.vllm_plugin.fork_server import engine_environment
from twotower_bench.servers.server import VllmServer, free_ports
from twotower_spec.demo.trio import trio_path


@contextmanager
def serving(*arguments: str) -> Iterator[VllmServer]:
    """Starts a server, and stops it and its processes at the end.

    Args:
        arguments: of `vllm serve`, beside those that the trio needs.
    """
    words = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", *arguments]
    (port,) = free_ports(1)
    # Not pytest's folders: vLLM's sockets lie in it, whose paths have 107 characters at most.
    with (
        TemporaryDirectory(prefix="serve-") as folder,
        closing(
            VllmServer("the trio", str(trio_path("verifier")), words, port, Path(folder), engine_environment())
        ) as server,
    ):
        server.wait_until_ready()
        yield server
