"""Two ranks: the first alone holds the towers and drafts, and both write the same tokens above temperature 0 too."""

from importlib.util import find_spec

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


def test_ranks_hold_the_same_tokens_after_every_step() -> None:
    found = run_engine(
        ["equal_ranks"],
        two_tower(7, policy="fixed", block_size=8),
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        tensor_parallel_size=2,
        worker_extension_cls="tests.vllm_plugin.ranks.RankReport",
        **ROOMY,
    )["equal_ranks"]
    assert found["steps"] > 10
    assert found["has_towers"] == [True, False]
    assert found["accepted"][0] > 20
