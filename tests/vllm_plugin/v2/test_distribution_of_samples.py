"""First and second tokens of sampled requests on model runner V2 are V1's, whose distribution is tested beside V1.

A request costs V2 some 40 ms on a CPU: a tenth of the samples are drawn here. With `NUM_SAMPLES=640` in the environment
all of them are, and the same chi-squared test as on V1 looks at them.
"""

import os
from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import run_engine, two_tower
from tests.vllm_plugin.scenarios import SAMPLED_KINDS
from tests.vllm_plugin.test_distribution_of_samples import SAME_REQUEST_IDS, WIDE, check_distribution
from tests.vllm_plugin.v2.engine import run_v2_engine

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

SETTINGS = two_tower(3, policy="fixed", block_size=4, verification="one-hot")
NUM_SAMPLES = int(os.environ.get("NUM_SAMPLES", "64"))
VARIABLES = {**SAME_REQUEST_IDS, "NUM_SAMPLES": str(NUM_SAMPLES)}


@pytest.fixture(scope="module")
def on_v2() -> dict[str, Any]:
    return run_v2_engine(["many_samples", "facts"], SETTINGS, VARIABLES, **WIDE)


def test_first_and_second_tokens_are_those_of_v1(on_v2: dict[str, Any]) -> None:
    on_v1 = run_engine(["many_samples"], SETTINGS, VARIABLES, **WIDE)["many_samples"]
    for kind in SAMPLED_KINDS:
        found = [row[:2] for row in on_v2["many_samples"][kind]]
        assert len(found) == NUM_SAMPLES and len(set(map(tuple, found))) > 1, kind
        assert found == [row[:2] for row in on_v1[kind]], kind
    facts = on_v2["facts"]
    # Both ways to a second token are compared; what is drafted beyond the third one, the last, is rejected or cut.
    num_requests = NUM_SAMPLES * len(SAMPLED_KINDS)
    assert 0.2 < facts["accepted"] / num_requests < 0.9 and facts["sampler_fallbacks"] == 0


@pytest.mark.skipif(NUM_SAMPLES < 640, reason="needs NUM_SAMPLES=640 in the environment, minutes of a core")
def test_every_position_is_distributed_as_the_verifier_has_it(on_v2: dict[str, Any]) -> None:
    exact = run_engine(["exact_probabilities"], None, **WIDE)["exact_probabilities"]
    check_distribution(on_v2["many_samples"], exact)
