"""`vllm serve`, as a user starts it, on a port of its own."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import torch

from twotower_bench.child_process import ChildProcess, WatchedProcess, signals_held
from twotower_bench.environment import engine_environment
from twotower_bench.fork_server import ForkServer
from twotower_bench.records import System
from twotower_spec.errors import ArgumentError

# `vllm`, whether or not its script is on the path. -P: nothing is imported from the working directory.
VLLM = (sys.executable, "-P", "-m", "vllm.entrypoints.cli.main")
FORKED_VLLM = "twotower_bench.servers.forked_server:run_vllm"
HOST = "127.0.0.1"
# Large models take their time; one that cannot be loaded ends its server, which is noticed at once.
READY_WITHIN_S = 3600.0
ANSWERS_WITHIN_S = 30.0


@dataclass(frozen=True)
class Endpoint:
    """Where a server is.

    Attributes:
        url: without a path.
        model: its name in requests.
        tokenizer: directory or hub id.
    """

    url: str
    model: str
    tokenizer: str

    @classmethod
    def of_running_server(cls, url: str, tokenizer: str | None = None) -> Endpoint:
        """Asks a server that others have started what it serves; its tokenizer is the model's unless one is named."""
        url = url.rstrip("/").removesuffix("/v1")
        try:
            model = json.loads(_get(f"{url}/v1/models"))["data"][0]
            return cls(url, model["id"], tokenizer or model.get("root") or model["id"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ArgumentError(
                f"--base-url {url} does not answer as vLLM does ({error}); start `vllm serve` there, or leave it out "
                f"and the servers are started here"
            ) from error

    def is_ready(self) -> bool:
        """Whether it answers."""
        with suppress(OSError):
            self.get("/health")
            return True
        return False

    def get(self, path: str) -> str:
        """Body of a page."""
        return _get(self.url + path)


class Server:
    """Server that the load generator asks; others may have started it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def check(self) -> None:
        """Raises a `ChildError` if it is known to have ended."""


class VllmServer(Server):
    """Server of ours, which starts loading when it is made."""

    def __init__(
        self,
        title: str,
        verifier: str,
        arguments: Sequence[str],
        port: int,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        fork_server: ForkServer | None = None,
    ) -> None:
        """Starts the process and returns at once.

        Args:
            title: what errors call it.
            verifier: directory or hub id.
            arguments: of `vllm serve`.
            port: free.
            folder: for its output and temporary files, its own.
            environment: variables beside those of all engines.
            fork_server: forks the process and its engine; None for fresh ones.
        """
        super().__init__(Endpoint(f"http://{HOST}:{port}", verifier, verifier))
        words = ("serve", verifier, *arguments, "--host", HOST, "--port", str(port))
        # Of an API server its engine is a process apart.
        variables = {**engine_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(environment or {})}
        name = f"the server with {title}"
        self._process: WatchedProcess
        if fork_server is None:
            self._process = ChildProcess(name, [*VLLM, *words], folder, variables)
        else:
            self._process = fork_server.fork(name, FORKED_VLLM, words, folder, variables)

    @property
    def pid(self) -> int:
        """Process id of the first of its processes."""
        return self._process.pid

    @property
    def log(self) -> Path:
        """File of what it has said so far."""
        return self._process.log

    def wait_until_ready(self) -> None:
        """Returns when the models are loaded; a `ChildError` where they cannot be."""
        end = time.monotonic() + READY_WITHIN_S
        while not self.endpoint.is_ready():
            self._process.check("while loading")
            if time.monotonic() > end:
                raise self._process.failure(f"was not ready after {READY_WITHIN_S:.0f} s")
            time.sleep(0.3)

    def check(self) -> None:
        """Raises a `ChildError` if it has ended."""
        self._process.check("while answering")

    def ask_to_end(self) -> None:
        """Returns at once."""
        self._process.ask_to_end()

    def close(self) -> None:
        """Ends it with all its processes."""
        self._process.close()

    def kill(self) -> None:
        """Ends it with all its processes, at once."""
        self._process.kill()


def arguments_of(system: System, arguments: Sequence[str]) -> list[str]:
    """Arguments of `vllm serve`, the same for all systems but for the speculation."""
    # Prompts come again in every repeat; a server's do not. Whoever wants the cache says so in the arguments.
    words = ["--no-enable-prefix-caching", *arguments]
    if system.speculative_config:
        words += ["--speculative-config", json.dumps(dict(system.speculative_config))]
    return words


@contextmanager
def running_servers(
    systems: Sequence[System], verifier: str, arguments: Sequence[str], fork_server: ForkServer | None = None
) -> Iterator[Mapping[str, VllmServer]]:
    """A server for every system by its name, the last at least still loading; all are stopped in the end.

    Args:
        systems, verifier, arguments: of the servers.
        fork_server: see `VllmServer`.
    """
    with TemporaryDirectory(prefix="twotower-serve-") as folder, ExitStack() as stack:
        servers: dict[str, VllmServer] = {}
        try:
            for number, (system, port) in enumerate(zip(systems, free_ports(len(systems)), strict=True)):
                # vLLM sizes its cache by the memory that is free, so on a GPU none loads beside another.
                if servers and torch.cuda.is_available():
                    servers[systems[number - 1].name].wait_until_ready()
                # Numbers, because sockets in it must have short paths and a rival's name can be anything.
                own_folder = Path(folder) / str(number)
                own_folder.mkdir()
                with signals_held():
                    servers[system.name] = VllmServer(
                        system.title,
                        verifier,
                        arguments_of(system, arguments),
                        port,
                        own_folder,
                        fork_server=fork_server,
                    )
                    stack.callback(servers[system.name].close)
            yield servers
        finally:
            # All at once: each takes seconds to leave.
            for server in servers.values():
                server.ask_to_end()


def free_ports(count: int) -> list[int]:
    """Finds different ports: all are held until the last is found."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def without_proxy() -> dict[str, str]:
    """Variables for a process that asks `HOST`: no proxy is between."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    # "*", which is all hosts, has no meaning in a list.
    hosts = hosts if hosts.strip() == "*" else ",".join(filter(None, (hosts, HOST)))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def _get(url: str) -> str:
    # The key that `vllm bench serve` sends, too.
    key = os.environ.get("OPENAI_API_KEY")
    request = Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    opener = build_opener(ProxyHandler({})) if urlsplit(url).hostname == HOST else build_opener()
    with opener.open(request, timeout=ANSWERS_WITHIN_S) as response:
        return str(response.read().decode())
