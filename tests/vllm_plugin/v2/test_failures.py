"""A fault costs drafts in model runner V2 too, where nothing else would catch it; it is counted, and logged once."""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower
from tests.vllm_plugin.test_failures import COUNTED_AS
from tests.vllm_plugin.v2.engine import run_v2_engine

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def engine() -> dict[str, Any]:
    return run_v2_engine(["faults_on_v2"], two_tower(8, policy="fixed", block_size=8), **ROOMY)


@pytest.mark.parametrize(
    "fault", ["history", "late history", "denoiser pass", "policy", "damaged state", "full pool", "sampler"]
)
def test_requests_go_on_and_drafts_come_back(fault: str, engine: dict[str, Any]) -> None:
    expected = run_engine(["plain_text"], None, **ROOMY)["plain_text"]
    found = engine["faults_on_v2"][fault]
    assert found["during"] == expected and found["after"] == expected
    if fault in COUNTED_AS or "history" in fault:
        assert found["fallbacks"][COUNTED_AS.get(fault, "error")] > 0
    assert found["accepted_after"] > 50


def test_every_kind_of_fault_is_logged_once_with_a_remedy(engine: dict[str, Any]) -> None:
    log = engine["log"]
    for kind in ("RuntimeError", "ValueError", "ZeroDivisionError"):
        assert log.count(f"({kind}: injected); please report this") == 1, kind
    assert log.count("vLLM's own took over") == 1


def test_an_engine_whose_drafter_cannot_be_loaded_runs_without_drafts() -> None:
    expected = run_engine(["plain_text"], None, **ROOMY)["plain_text"]
    found = run_v2_engine(["plain_text"], two_tower(8), prepare="fail_to_load", **ROOMY)
    assert found["plain_text"] == expected
    assert found["log"].count("loading failed; vLLM goes on without drafts") == 1
