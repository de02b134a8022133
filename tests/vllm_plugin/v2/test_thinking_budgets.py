"""Thinking budgets on model runner V2, which counts them otherwise than V1: drafts change nothing of what V2 writes."""

from importlib.util import find_spec

import pytest

from tests.vllm_plugin.engine import two_tower
from tests.vllm_plugin.features import REASONING
from tests.vllm_plugin.test_pairs_of_features import BUDGETS, ENGINE
from tests.vllm_plugin.v2.engine import run_v2_engine

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


def test_thinking_ends_with_the_whole_phrase_as_without_drafts() -> None:
    found = run_v2_engine([BUDGETS, "facts"], two_tower(8, policy="fixed", block_size=8), **ENGINE)
    assert found[BUDGETS] == run_v2_engine([BUDGETS], None, **ENGINE)[BUDGETS]
    ended = [index for index, text in found[BUDGETS] if index % 2 and REASONING["reasoning_end_str"] in text]
    assert len(ended) >= 8
    assert found["facts"]["accepted"] > 50 and found["facts"]["errors"] == found["facts"]["sampler_fallbacks"] == 0
