"""Processes that have imported vLLM already, for engines and whatever else of vLLM changes the process it is in."""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from twotower_bench.environment import engine_environment as quiet_environment
from twotower_bench.fork_server import ForkedProcess, ForkServer

ROOT = Path(__file__).resolve().parents[2]

# Names the vLLM that `python -m tests.versions` has put before the environment's.
TESTED_VERSION = "TWOTOWER_TESTED_VLLM"

# With these variables vLLM's model runner V2 can run on a CPU, interpreted; they count where vLLM is imported.
V2_PATHS = [str(ROOT / "tests" / "support" / "v2_on_cpu"), *filter(None, [os.environ.get("PYTHONPATH")])]
TRITON_ON_CPU = {"PYTHONPATH": os.pathsep.join(V2_PATHS), "TRITON_INTERPRET": "1"}
V2_ON_CPU = {**TRITON_ON_CPU, "VLLM_USE_V2_MODEL_RUNNER": "1"}


# What vLLM compiles, such as ranks of log-probabilities, is compiled once for all processes: else it would lie in the
# folder for temporary files, which every process has to itself, and take 15 s of a core in each. The other two spare
# every process questions to the compiler that pay for larger code alone.
COMPILED = {
    "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".pytest_cache" / "torchinductor"),
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    "TORCHINDUCTOR_VEC_ISA_OK": "0",
}


def engine_environment() -> dict[str, str]:
    """Environment as in the demo, but with the whole log, and without network: no name is looked up on a hub."""
    quiet = {**os.environ, **quiet_environment()}
    return {**quiet, **COMPILED, "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1"}


def run_forked(
    function: str, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None, timeout_s: float = 400
) -> int:
    """Exit code of a process that called a function; for the arguments see `fork`."""
    return fork(function, *arguments, folder=folder, environment=environment, timeout_s=timeout_s).wait()


def fork(
    function: str, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None, timeout_s: float = 400
) -> ForkedProcess:
    """Process that calls a function.

    Args:
        function: as in `package.module:name`.
        arguments: of the function.
        folder: for its `log` and temporary files.
        environment: variables beside those of all engines.
        timeout_s: after which it ends with an error.
    """
    server, variables = server_and_variables(environment)
    call = ("tests.vllm_plugin.fork_server:call", (function, arguments, timeout_s))
    return server.fork("the engine", *call, folder, variables)


def server_and_variables(environment: Mapping[str, str] | None = None) -> tuple[ForkServer, dict[str, str]]:
    """Process to fork from, and the whole environment of a fork; with `TRITON_ON_CPU` it is another process."""
    given = environment or {}
    imports = TRITON_ON_CPU if TRITON_ON_CPU.items() <= given.items() else {}
    rest = {name: one for name, one in given.items() if name not in imports}
    return shared_fork_server(**imports), {**_with_tests(**imports), **rest}


def results_of(
    function: str, order: str, environment: Mapping[str, str] | None = None, timeout_s: float = 400
) -> tuple[Any, str]:
    """Results of a function in a process of its own, and the log of the process.

    Args:
        function: takes the order and the name of a file, into which it writes its results as JSON.
        order: its first argument.
        environment, timeout_s: as of `run_forked`.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        output = folder / "results.json"
        code = run_forked(function, order, str(output), folder=folder, environment=environment, timeout_s=timeout_s)
        said = (folder / "log").read_text()
        assert code == 0, f"the process ended with {code}\n{said[-6000:]}"
        return json.loads(output.read_text()), said


def call(function: str, arguments: tuple[str, ...], timeout_s: float) -> None:
    """Calls a function, and shows where it is and ends the process if it takes too long."""
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    check_version(import_module("vllm").__version__)
    module, _, name = function.partition(":")
    getattr(import_module(module), name)(*arguments)


def check_version(imported: str) -> None:
    """Sees to it that no test runs another vLLM than the one that it is said to run."""
    tested = os.environ.get(TESTED_VERSION)
    assert tested is None or imported.partition("+")[0] == tested, f"vLLM {imported} was imported, not {tested}"


def share_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets commands that run in this process fork from the one process of the tests, which goes on after them."""
    for user in ("engines.pool", "servers.measuring"):
        monkeypatch.setattr(f"twotower_bench.{user}.running_fork_server", lambda: nullcontext(shared_fork_server()))


@cache
def _folder() -> TemporaryDirectory[str]:
    """Goes with this process."""
    return TemporaryDirectory(prefix="fork-server-")


@cache
def shared_fork_server(**imports: str) -> ForkServer:
    """Process that everything is forked from, one for every set of variables that imports read; ends with this one."""
    folder = Path(_folder().name) / str(len(imports))
    folder.mkdir()
    return ForkServer(folder, _with_tests(**imports))


def _with_tests(**imports: str) -> dict[str, str]:
    environment = {**engine_environment(), **imports}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}
