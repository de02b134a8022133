"""The vLLM that is said to be tested is the one that every process imports."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.vllm_plugin.fork_server import TESTED_VERSION, TRITON_ON_CPU, check_version, engine_environment, results_of

pytestmark = [pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"), pytest.mark.slow]

WHERE = "import vllm; print(vllm.__version__.partition('+')[0])"


def write_version(_: str, output: str) -> None:
    import vllm

    Path(output).write_text(json.dumps(vllm.__version__.partition("+")[0]))


def test_processes_import_the_vllm_that_is_tested() -> None:
    tested = os.environ.get(TESTED_VERSION) or version("vllm").partition("+")[0]
    assert results_of(f"{__name__}:write_version", "")[0] == tested
    assert results_of(f"{__name__}:write_version", "", TRITON_ON_CPU)[0] == tested
    command = [sys.executable, "-P", "-c", WHERE]
    said = subprocess.run(command, env=engine_environment(), capture_output=True, text=True, check=True)
    assert said.stdout.split()[-1] == tested


def test_another_vllm_than_the_one_that_is_tested_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TESTED_VERSION, "0.27.0")
    check_version("0.27.0+cpu")
    with pytest.raises(AssertionError, match=r"vLLM 0\.32\.0 was imported, not 0\.27\.0"):
        check_version("0.32.0")
