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
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

from twotower_bench.engines import engine_environment as quiet_environment

ROOT = Path(__file__).resolve().parents[2]
IMPORTED_FIRST = ("vllm.v1.worker.gpu_model_runner", "tests.vllm_plugin.scenarios")


def engine_environment() -> dict[str, str]:
    """Environment as in the demo, but with the whole log, and without network: no name is looked up on a hub."""
    return {**os.environ, **quiet_environment(), "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1"}


def run_forked(
    function: str,
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: int = 400,
) -> int:
    """Exit code of a process that called a function.

    Args:
        function: as in `package.module:name`.
        arguments: of the function.
        log: file for what the process says; its temporary files lie beside it.
        environment: variables beside those of all engines.
        timeout_s: after which it ends with an error.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    order = [function, list(arguments), str(log), {**engine_environment(), **(environment or {})}, timeout_s]
    print(json.dumps(order), file=server.stdin, flush=True)
    return int(server.stdout.readline())


@cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=ROOT,
        env=engine_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _serve() -> None:
    for module in IMPORTED_FIRST:
        import_module(module)
    gc.freeze()  # forks share what is here, and their collector need not look at it
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(*json.loads(line))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _run(function: str, arguments: Sequence[str], log: str, environment: Mapping[str, str], timeout_s: int) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = str(Path(log).parent)
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    module, _, name = function.partition(":")
    getattr(import_module(module), name)(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to take the interpreter apart would cost as much as all of a fork's start


if __name__ == "__main__":
    _serve()
