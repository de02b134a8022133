"""Two ranks on model runner V2: the first drafts, both verify the same drafts and accept the same of them."""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower
from tests.vllm_plugin.test_distribution_of_samples import SAME_REQUEST_IDS
from tests.vllm_plugin.v2.engine import run_v2_engine

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

SETTINGS = two_tower(7, policy="fixed", block_size=8, verification="coupled")
ENGINE = {**ROOMY, "worker_extension_cls": "tests.vllm_plugin.ranks.RankReport"}
TEXTS, FAULTS = "equal_ranks", "equal_ranks_under_faults"


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    variables = {**SAME_REQUEST_IDS, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    return run_v2_engine([TEXTS, FAULTS], SETTINGS, variables, tensor_parallel_size=2, **ENGINE)


def test_ranks_hold_the_same_tokens_after_every_step_and_write_the_text_of_one_rank_on_v1(
    two_ranks: dict[str, Any],
) -> None:
    found = two_ranks[TEXTS]
    expected = run_engine([TEXTS], SETTINGS, SAME_REQUEST_IDS, **ENGINE)[TEXTS]
    assert found["texts"] == expected["texts"]
    assert found["steps"] > 10
    assert found["has_towers"] == [True, False]
    assert found["accepted"][0] > 100


def test_a_fault_of_the_rank_that_drafts_costs_drafts_and_leaves_no_rank_waiting(two_ranks: dict[str, Any]) -> None:
    expected = run_engine(["plain_text"], None, **ROOMY)["plain_text"]
    assert two_ranks[FAULTS]["text"] == expected
    failed, waiting = two_ranks[FAULTS]["errors"]
    assert failed > 0 and waiting == 0
