"""Requests that ask for two things at once on model runner V2, and thinking budgets, in an engine with little room.

A step with log-probabilities costs V2 half a second on a CPU: every fourth pair is tried here, and with
`EVERY_NTH_PAIR=1` in the environment all of them. V2 counts the tokens of a thinking budget otherwise than V1, so that
requests with one are compared with those of V2 without drafts, and all others with V1.
"""

import os
from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import run_engine, two_tower
from tests.vllm_plugin.features import FEATURES, REASONING, SAMPLED_FEATURES
from tests.vllm_plugin.test_pairs_of_features import BUDGETS, ENGINE, GREEDY, SAMPLED, differences
from tests.vllm_plugin.v2.engine import run_v2_engine

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
    pytest.mark.timeout(1500),
]

CHOSEN = {"EVERY_NTH_PAIR": os.environ.get("EVERY_NTH_PAIR", "4")}
BUDGET = "thinking budget"


@pytest.fixture(scope="module")
def drafting() -> dict[str, Any]:
    settings = two_tower(8, policy="fixed", block_size=8, verification="coupled")
    return run_v2_engine([GREEDY, SAMPLED, BUDGETS, "strain", "facts"], settings, CHOSEN, timeout_s=1400, **ENGINE)


@pytest.fixture(scope="module")
def without_drafts() -> dict[str, Any]:
    return run_v2_engine([GREEDY, BUDGETS], None, {**CHOSEN, "PAIRS_WITH": BUDGET}, timeout_s=1400, **ENGINE)


def test_greedy_requests_get_what_they_get_on_v1_without_speculation(drafting: dict[str, Any]) -> None:
    expected = run_engine([GREEDY], None, CHOSEN, **ENGINE)[GREEDY]
    assert differences(*map(without_budgets, (drafting[GREEDY], expected))) == []


def test_requests_with_a_seed_get_what_they_get_on_v1_without_drafts(drafting: dict[str, Any]) -> None:
    expected = run_engine([SAMPLED], two_tower(8, policy="off", verification="coupled"), CHOSEN, **ENGINE)[SAMPLED]
    assert differences(*map(without_budgets, (drafting[SAMPLED], expected))) == []


def test_requests_with_a_thinking_budget_get_what_they_get_without_speculation(
    drafting: dict[str, Any], without_drafts: dict[str, Any]
) -> None:
    found = {name: one for name, one in drafting[GREEDY].items() if BUDGET in name}
    assert found and differences(found, without_drafts[GREEDY]) == []


def test_thinking_ends_with_the_whole_phrase_as_without_speculation(
    drafting: dict[str, Any], without_drafts: dict[str, Any]
) -> None:
    assert drafting[BUDGETS] == without_drafts[BUDGETS]
    ended = [index for index, text in drafting[BUDGETS] if index % 2 and REASONING["reasoning_end_str"] in text]
    assert len(ended) >= 8


def test_every_feature_was_asked_for_while_requests_were_thrown_out_and_drafts_accepted(
    drafting: dict[str, Any],
) -> None:
    asked = {
        feature for pairs in (drafting[GREEDY], drafting[SAMPLED]) for pair in pairs for feature in pair.split(" + ")
    }
    assert asked == FEATURES.keys() | SAMPLED_FEATURES.keys()
    strain, facts = drafting["strain"], drafting["facts"]
    assert strain["preemptions"] > 0 and strain["hits"] > 0
    assert facts["prefilling"] > 0 and facts["accepted"] > 300
    assert facts["errors"] == facts["sampler_fallbacks"] == 0


def without_budgets(pairs: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in pairs.items() if BUDGET not in name}
