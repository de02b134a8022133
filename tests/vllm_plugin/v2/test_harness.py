"""vLLM's model runner V2 on a CPU: what the tests beside this one stand on, seen without drafts."""

from importlib.util import find_spec

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine
from tests.vllm_plugin.v2.engine import run_v2_engine

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


def test_v2_runs_with_asynchronous_scheduling_and_writes_what_v1_writes() -> None:
    found = run_v2_engine(["plain_text", "runner"], None, **ROOMY)
    assert found["runner"] == {"module": "vllm.v1.worker.cpu.model_runner", "async_scheduling": True}
    assert found["plain_text"] == run_engine(["plain_text"], None, **ROOMY)["plain_text"]
