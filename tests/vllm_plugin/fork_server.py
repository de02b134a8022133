"""Processes forked from one that has imported vLLM, which is most of what a start on the bundled trio costs.

The fork happens before anything of vLLM has been made, and before torch has threads: what a fork computes is what a
process of its own would.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path


class ForkServer:
    """Our end; the other ends with this process."""

    def __init__(self, module: str, folder: Path, environment: Mapping[str, str]) -> None:
        """Starts a module that calls `serve_forks`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, timeout_s: float) -> int:
        """Exit code of a fork that has got the arguments, an environment of its own, and a file for what it says."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([arguments, dict(environment), str(log), timeout_s]), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


def serve_forks(run: Callable[..., None], imported_first: Sequence[str]) -> None:
    """Forks for every line of stdin, calls `run` there, and answers with the exit code."""
    for module in imported_first:
        import_module(module)
    gc.freeze()  # forks share what is here, and their collector need not look at it
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            arguments, environment, log, timeout_s = json.loads(line)
            _become_a_process_of_its_own(environment, log)
            faulthandler.dump_traceback_later(timeout_s, exit=True)
            run(*arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # to take the interpreter apart would cost as much as all of a fork's start
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _become_a_process_of_its_own(environment: Mapping[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = str(Path(log).parent)
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
