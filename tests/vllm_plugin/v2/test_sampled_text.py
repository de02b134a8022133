"""Sampled text of model runner V2 under the one-hot rule, named log-probabilities, and grammars after thinking.

V1 and V2 draft the same and draw the same noise, so that the text of V2 is that of V1, token by token; how that is
distributed is tested in `tests/vllm_plugin/test_distribution_of_samples.py`.
"""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower
from tests.vllm_plugin.test_distribution_of_samples import SAME_REQUEST_IDS
from tests.vllm_plugin.test_sampling_parameters import same
from tests.vllm_plugin.v2.engine import run_v2_engine

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

NAMED, AFTER_THINKING = "logprobs_of_named_tokens", "structured_outputs_after_thinking"
PARSER = {"prepare": "know_a_reasoning_parser", "reasoning_parser": "until_step"}
ENGINE = {**ROOMY, "max_logprobs": -1, **PARSER}
SETTINGS = two_tower(7, policy="fixed", block_size=8, pad_drafts=True)


@pytest.fixture(scope="module")
def on_v2() -> dict[str, Any]:
    scenarios = ["one_hot_samples", NAMED, AFTER_THINKING, "facts"]
    return run_v2_engine(scenarios, SETTINGS, SAME_REQUEST_IDS, **ENGINE)


def test_sampled_text_is_that_of_v1_with_seeds_and_without(on_v2: dict[str, Any]) -> None:
    on_v1 = run_engine(["one_hot_samples"], SETTINGS, SAME_REQUEST_IDS, **ENGINE)
    assert on_v2["one_hot_samples"] == on_v1["one_hot_samples"]
    facts = on_v2["facts"]
    assert 0.2 < facts["accepted"] / facts["drafted"] < 0.9
    assert facts["errors"] == facts["sampler_fallbacks"] == 0


def test_log_probabilities_of_named_tokens_are_those_without_speculation(on_v2: dict[str, Any]) -> None:
    expected = run_engine([NAMED, AFTER_THINKING], None, **ENGINE)[NAMED]
    assert same(on_v2[NAMED]["alone"], expected["alone"])
    assert same(on_v2[NAMED]["together"], on_v2[NAMED]["alone"])


def test_a_grammar_may_begin_to_hold_inside_a_draft(on_v2: dict[str, Any]) -> None:
    assert on_v2[AFTER_THINKING] == run_engine([NAMED, AFTER_THINKING], None, **ENGINE)[AFTER_THINKING]
