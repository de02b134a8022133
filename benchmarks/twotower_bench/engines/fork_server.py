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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

from twotower_bench.child_process import ChildError, ChildProcess, failure_with_log

IMPORTED_FIRST = ("vllm.v1.worker.gpu_model_runner", "vllm_twotower.v1.proposer")


@dataclass(frozen=True)
class ForkOrder:
    """A process that is asked for.

    Attributes:
        function: what it calls, as in `package.module:name`.
        arguments: of the function.
        folder: for its output and temporary files.
        environment: all of its variables.
        has_connection: whether a connection follows, which becomes the first argument.
    """

    function: str
    arguments: tuple[Any, ...]
    folder: str
    environment: Mapping[str, str]
    has_connection: bool


class ForkServer:
    """Our end of the process that forks."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Starts to import vLLM and returns at once.

        Args:
            folder: for output and temporary files of imports.
            environment: variables beside ours, for the imports.
        """
        self._connection, theirs = Pipe()
        self._pids, self._num_forks = list[int](), 0
        with theirs:
            command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
            self.process = ChildProcess("importing vLLM", command, folder, environment, [theirs.fileno()])

    def fork(
        self,
        title: str,
        function: str,
        arguments: tuple[Any, ...],
        folder: Path,
        environment: Mapping[str, str],
        connection: Connection | None = None,
    ) -> ForkedProcess:
        """Asks for a process and returns at once.

        Args:
            title: what errors call it.
            function, arguments: what it calls.
            folder: for its output and temporary files, its own.
            environment: variables beside ours.
            connection: first argument of the function.
        """
        variables = {**os.environ, **environment, "TMPDIR": str(folder)}
        with suppress(ConnectionError):  # it could not import vLLM, which whoever waits for the fork is told
            self._connection.send(ForkOrder(function, arguments, str(folder), variables, connection is not None))
            if connection is not None:
                send_handle(self._connection, connection.fileno(), self.process.pid)
        self._num_forks += 1
        return ForkedProcess(title, folder, self, self._num_forks - 1)

    def pid(self, number: int) -> int:
        """Process id of a fork, counted from 0; waits until vLLM is imported.

        Raises:
            EOFError: vLLM could not be imported.
        """
        while len(self._pids) < self._num_forks:
            self._pids.append(self._connection.recv())
        return self._pids[number]

    def wait(self, number: int) -> int:
        """Exit code of a fork that is about to end, or of the imports if they failed."""
        try:
            self._connection.send(self.pid(number))
            return int(self._connection.recv())
        except (EOFError, ConnectionError):
            return self.process.wait()

    def close(self) -> None:
        """Ends it at once; forks that have begun go on."""
        self._connection.close()
        self.process.kill()


class ForkedProcess:
    """A fork with a group and a log of its own."""

    def __init__(self, title: str, folder: Path, server: ForkServer, number: int) -> None:
        self.title, self._log, self._server, self._number = title, folder / "log", server, number

    def failure(self, what: str) -> ChildError:
        """An error with the last lines of its log, or of the imports where there is none."""
        return failure_with_log(self.title, what, self._log if self._log.exists() else self._server.process.log)

    def wait(self) -> int:
        """Exit code of a process that is about to end."""
        return self._server.wait(self._number)

    def kill(self) -> None:
        """Ends it at once, with whatever it started."""
        with suppress(EOFError, ConnectionError, ProcessLookupError):
            os.killpg(self._server.pid(self._number), signal.SIGKILL)
        self.wait()

    close = kill


def serve(connection: Connection) -> None:
    """Answers an order with the process id of a fork, and a process id with its exit code."""
    for module in IMPORTED_FIRST:
        import_module(module)
    gc.freeze()  # forks share what is here, and their collector need not look at it
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        if isinstance(order, int):
            _, status = os.waitpid(order, 0)
            connection.send(os.waitstatus_to_exitcode(status))
            continue
        descriptors = [recv_handle(connection)] if order.has_connection else []
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            connection.close()
            _run(order, [_own_connection(one) for one in descriptors])
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(child)


def _own_connection(descriptor: int) -> Connection:
    os.set_inheritable(descriptor, False)  # whoever holds the other end must see it close when this process ends
    return Connection(descriptor)


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
    serve(_own_connection(int(sys.argv[1])))
