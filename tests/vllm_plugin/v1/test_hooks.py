"""Fallbacks with a vLLM that lacks a hook, or does less than the newest."""

from importlib.util import find_spec

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower
from tests.vllm_plugin.installed import needs_the_stock_sampler

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


@needs_the_stock_sampler()
def test_nothing_is_drafted_where_the_runner_is_not_known() -> None:
    expected = run_engine(["plain_text", "joining_and_leaving"], None, **ROOMY)
    found = run_engine(["without_hooks"], two_tower(8, policy="fixed", block_size=8), **ROOMY)["without_hooks"]
    assert found == [expected["plain_text"], expected["joining_and_leaving"]]


def test_our_sampler_works_in_steps_without_drafts_as_they_were_before_0_32() -> None:
    settings = two_tower(8, policy="off", verification="coupled")
    assert run_engine(["steps_without_drafts_as_before_0_32"], settings, **ROOMY)


def test_a_worker_without_a_hook_warns_once_and_runs_without_drafts() -> None:
    expected = run_engine(["plain_text"], None, **ROOMY)["plain_text"]
    found = run_engine(["plain_text"], two_tower(8), prepare="lack_a_hook", **ROOMY)
    assert found["plain_text"] == expected
    assert found["log"].count("so TwoTower drafters cannot be used") == 1
