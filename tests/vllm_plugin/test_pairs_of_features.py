"""Requests that ask for two things at once get what they get without drafts, in an engine with little room."""

import math
from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, TIGHT, run_engine, two_tower
from tests.vllm_plugin.features import FEATURES, REASONING, SAMPLED_FEATURES
from tests.vllm_plugin.installed import ends_at_stop_strings
from vllm_twotower.sampling_parameters import OF_REQUESTS, Handling, names

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

ENGINE = {**TIGHT, "reasoning_config": REASONING}
GREEDY, SAMPLED, BUDGETS = "pairs_of_features", "sampled_pairs_of_features", "thinking_budgets"


@pytest.fixture(scope="module")
def drafting() -> dict[str, Any]:
    settings = two_tower(8, policy="fixed", block_size=8, verification="coupled")
    return run_engine([GREEDY, SAMPLED, BUDGETS, "strain", "facts"], settings, **ENGINE)


@pytest.fixture(scope="module")
def without_speculation() -> dict[str, Any]:
    return run_engine([GREEDY, BUDGETS, "strain"], None, **ENGINE)


@pytest.fixture(scope="module")
def policy_off() -> dict[str, Any]:
    return run_engine([SAMPLED], two_tower(8, policy="off", verification="coupled"), **ENGINE)


def test_greedy_requests_get_what_they_get_without_speculation(
    drafting: dict[str, Any], without_speculation: dict[str, Any]
) -> None:
    assert differences(drafting[GREEDY], without_speculation[GREEDY]) == []


def test_requests_with_a_seed_get_what_they_get_without_drafts(
    drafting: dict[str, Any], policy_off: dict[str, Any]
) -> None:
    assert differences(drafting[SAMPLED], policy_off[SAMPLED]) == []


def test_thinking_ends_within_the_budget_with_the_whole_phrase_as_without_speculation(
    drafting: dict[str, Any], without_speculation: dict[str, Any]
) -> None:
    assert drafting[BUDGETS] == without_speculation[BUDGETS]
    ended = [index for index, text in drafting[BUDGETS] if index % 2 and REASONING["reasoning_end_str"] in text]
    assert len(ended) >= 8


def test_a_grammar_may_begin_to_hold_inside_a_draft() -> None:
    engine = {**ROOMY, "prepare": "know_a_reasoning_parser", "reasoning_parser": "until_step"}
    name = "structured_outputs_after_thinking"
    found = run_engine([name, "facts"], two_tower(8, policy="fixed", block_size=8), **engine)
    assert found[name] == run_engine([name], None, **engine)[name]
    assert found["facts"]["accepted"] > 80 and found["facts"]["errors"] == 0


def test_prompts_were_read_in_pieces_requests_were_thrown_out_and_drafts_accepted(
    drafting: dict[str, Any], without_speculation: dict[str, Any]
) -> None:
    for found in (drafting, without_speculation):
        assert found["strain"]["preemptions"] > 0 and found["strain"]["hits"] > 0
    facts = drafting["facts"]
    assert facts["prefilling"] > 0 and facts["accepted"] > 500
    assert facts["errors"] == facts["sampler_fallbacks"] == 0


def test_every_parameter_that_we_answer_for_is_crossed() -> None:
    asked = {name for given in (FEATURES | SAMPLED_FEATURES).values() for name in given} | {"temperature", "seed"}
    assert asked.issuperset(names(OF_REQUESTS, Handling.OURS, Handling.NO_DRAFTS))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Pairs whose requests got something else; log-probabilities to 1e-4, as sums are taken in other orders."""
    assert found.keys() == expected.keys()
    compared = [name for name in found if ends_at_stop_strings() or "stop strings" not in name]
    return [
        name
        for name, one in ((name, found[name]) for name in compared)
        if one["text"] != expected[name]["text"] or not close(one["logprobs"], expected[name]["logprobs"])
    ]


def close(found: Any, expected: Any) -> bool:
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return bool(found == expected or math.isclose(found, expected, abs_tol=1e-4))
