"""A fault of the drafter costs drafts, never a request and never the engine; it is counted, and logged once."""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower
from tests.vllm_plugin.installed import needs_the_stock_sampler, samples_on_a_cpu
from tests.vllm_plugin.scenarios import FAULTS

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

COUNTED_AS = {
    "context pass": "error",
    "denoiser pass": "error",
    "out of memory": "error",
    "pool bookkeeping": "error",
    "policy": "error",
    "damaged state": "not finite",
    "full pool": "no room",
}


@pytest.fixture(scope="module")
def engine() -> dict[str, Any]:
    return run_engine(["faults"], two_tower(8, policy="fixed", block_size=8), **ROOMY)


FAULTS_HERE = [pytest.param(name, marks=needs_the_stock_sampler()) if name == "sampler" else name for name in FAULTS]


@pytest.mark.parametrize("fault", FAULTS_HERE)
def test_requests_go_on_without_drafts_and_drafts_come_back(fault: str, engine: dict[str, Any]) -> None:
    expected = run_engine(["plain_text"], None, **ROOMY)["plain_text"]
    found = engine["faults"][fault]
    assert found["during"] == expected and found["after"] == expected
    if fault in COUNTED_AS:
        assert found["fallbacks"][COUNTED_AS[fault]] > 0
    assert found["accepted_after"] > 50


def test_every_kind_of_fault_is_logged_once_with_a_remedy(engine: dict[str, Any]) -> None:
    log = engine["log"]
    for kind in ("RuntimeError", "ValueError", "StateFullError", "ZeroDivisionError"):
        assert log.count(f"({kind}: injected); please report this") == 1, kind
    assert log.count("(OutOfMemoryError: injected); lower pool_requests or pool_tokens") == 1
    if samples_on_a_cpu():
        assert log.count("vLLM's own took over") == 1


def test_an_engine_whose_drafter_cannot_be_loaded_runs_without_drafts() -> None:
    expected = run_engine(["plain_text"], None, **ROOMY)["plain_text"]
    found = run_engine(["plain_text"], two_tower(8), prepare="fail_to_load", **ROOMY)
    assert found["plain_text"] == expected
    assert found["log"].count("loading failed; vLLM goes on without drafts") == 1
