"""Processes forked from one that has imported vLLM: that is most of what a start with small models costs.

The fork happens before vLLM has made anything and before torch has threads: a fork computes what any process would.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from twotower_bench.child_process import ChildError, WatchedProcess, failure_with_log
from twotower_bench.connected_process import ConnectedProcess, own_end
from twotower_bench.environment import engine_environment

# What engines, servers and the load generator would each import, the first of them first as vLLM wants it.
IMPORTED_FIRST = (
    "vllm.v1.worker.cpu_worker",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.benchmarks.serve",
    "vllm_twotower.v1.proposer",
)


class ForkOrder(NamedTuple):
    """A process that is asked for, see `ForkServer.fork`; the environment has all of its variables."""

    function: str
    arguments: tuple[Any, ...]
    folder: str
    environment: Mapping[str, str]
    is_connected: bool


class WaitOrder(NamedTuple):
    """An exit code that is asked for; it need not be there yet where `now`."""

    pid: int
    now: bool


class ForkServer:
    """Our end of the process that forks."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Starts to import vLLM, with a folder and variables for the imports, and returns at once."""
        self.process = ConnectedProcess("importing vLLM", __name__, folder, environment)
        self._connection = self.process.connection
        self._pids, self._num_forks = list[int](), 0

    def fork(
        self,
        title: str,
        function: str,
        arguments: tuple[Any, ...],
        folder: Path,
        environment: Mapping[str, str],
        *,
        is_connected: bool = False,
    ) -> ForkedProcess:
        """Asks for a process and returns at once.

        Args:
            title: what errors call it.
            function, arguments: what it calls, as in `package.module:name`.
            folder: for its output and temporary files, its own.
            environment: variables beside ours.
            is_connected: whether the first argument of the function is a connection to us.
        """
        variables = {**os.environ, **environment, "TMPDIR": str(folder)}
        ours, theirs = Pipe() if is_connected else (None, None)
        with suppress(ConnectionError):  # it could not import vLLM, which whoever waits for the fork is told
            self._connection.send(ForkOrder(function, arguments, str(folder), variables, is_connected))
            if theirs:
                send_handle(self._connection, theirs.fileno(), self.process.pid)
        if theirs:
            theirs.close()
        self._num_forks += 1
        return ForkedProcess(title, folder, self, self._num_forks - 1, ours)

    def pid(self, number: int) -> int:
        """Process id of a fork, counted from 0, when vLLM is imported; an `EOFError` where it cannot be."""
        while len(self._pids) < self._num_forks:
            self._pids.append(self._connection.recv())
        return self._pids[number]

    def wait(self, number: int, now: bool = False) -> int | None:
        """Exit code of a fork that is about to end, or of the imports if they failed; None where `now` is too early.

        Once it was there, it is not there again.
        """
        try:
            self._connection.send(WaitOrder(self.pid(number), now))
            code: int | None = self._connection.recv()
            return code
        except (EOFError, ConnectionError):
            return self.process.wait()

    def close(self) -> None:
        """Ends it at once; forks that have begun go on."""
        self._connection.close()
        self.process.kill()


class ForkedProcess(WatchedProcess):
    """A fork, which begins when vLLM is imported."""

    def __init__(
        self, title: str, folder: Path, server: ForkServer, number: int, connection: Connection | None
    ) -> None:
        self.title, self.log, self._server, self._number = title, folder / "log", server, number
        self.connection = connection
        self._exit_code: int | None = None

    @property
    def pid(self) -> int:
        """Process id, and that of its group; an `EOFError` where vLLM cannot be imported."""
        return self._server.pid(self._number)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        if self._exit_code is None:
            self._exit_code = self._server.wait(self._number, now=True)
        return self._exit_code

    def wait(self) -> int:
        """Exit code of a process that is about to end."""
        if self._exit_code is None:
            self._exit_code = self._server.wait(self._number)
        assert self._exit_code is not None
        return self._exit_code

    def failure(self, what: str) -> ChildError:
        """An error with the last lines of its log, or of the imports where there is none."""
        return failure_with_log(self.title, what, self.log if self.log.exists() else self._server.process.log)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(EOFError, ConnectionError):
            super()._signal(number)


@contextmanager
def running_fork_server() -> Iterator[ForkServer | None]:
    """The process to fork from; None on a GPU, where loading weights is what takes long."""
    if torch.cuda.is_available():
        yield None
        return
    with (
        TemporaryDirectory(prefix="twotower-vllm-") as folder,
        closing(ForkServer(Path(folder), engine_environment())) as server,
    ):
        yield server


def serve(connection: Connection) -> None:
    """Answers an order with the process id of a fork, or with an exit code."""
    for module in IMPORTED_FIRST:
        import_module(module)
    gc.freeze()  # forks share what is here, and their collector need not look at it
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        if isinstance(order, WaitOrder):
            pid, status = os.waitpid(order.pid, os.WNOHANG if order.now else 0)
            connection.send(os.waitstatus_to_exitcode(status) if pid else None)
            continue
        descriptors = [recv_handle(connection)] if order.is_connected else []
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            connection.close()
            _run(order, [own_end(one) for one in descriptors])
        for descriptor in descriptors:
            os.close(descriptor)
        with suppress(OSError):  # it may have ended; it does so itself, but a signal to the group may be quicker
            os.setpgid(child, child)
        connection.send(child)


def _run(order: ForkOrder, connections: list[Connection]) -> None:
    """Becomes a process of its own, calls the function, and ends."""
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(order.environment)
    tempfile.tempdir = order.folder
    output = os.open(Path(order.folder) / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        module, _, name = order.function.partition(":")
        getattr(import_module(module), name)(*connections, *order.arguments)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # to take the interpreter apart would cost as much as all of a start


if __name__ == "__main__":
    # By its real name: the classes of the orders that come are those of that module.
    import_module("twotower_bench.fork_server").serve(own_end(int(sys.argv[1])))
