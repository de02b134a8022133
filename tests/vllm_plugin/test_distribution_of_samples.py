"""Sampled text is distributed as the verifier's, in real vLLM: chi-squared against exact probabilities.

N and bound are fixed beforehand: 640 requests per kind of request, p > 1e-4 at each of 2 positions; 5 kinds, 2 rules:
20 tests, so that a right sampler fails in one of 500 runs. Seeds and ids of requests are fixed: every run is the same.

A wrong sampler, which draws the token in place of a rejected draft from the whole distribution instead of the rest,
fails in each kind alone with a power of 0.99 or more where the draft has a probability of 0.1 or more, and of 0.9999 or
more at the most probable token, whose probability is 0.26 to 0.42 (noncentral chi-squared, from exact probabilities).
"""

from collections import Counter
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.vllm_plugin.engine import run_engine, two_tower
from tests.vllm_plugin.scenarios import NUM_SAMPLES, SAMPLED_KINDS

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

WIDE = {"max_model_len": 192, "max_num_seqs": 64, "max_num_batched_tokens": 1024, "max_logprobs": -1}
LEAST_EXPECTED = 5.0
# Without a seed of its own a request's noise comes from its id.
SAME_REQUEST_IDS = {"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1"}


@pytest.fixture(scope="module")
def exact() -> Any:
    return run_engine(["exact_probabilities"], None, **WIDE)["exact_probabilities"]


@pytest.mark.parametrize("verification", ["one-hot", "coupled"])
def test_every_position_is_distributed_as_the_verifier_has_it(verification: str, exact: Any) -> None:
    settings = two_tower(3, policy="fixed", block_size=4, verification=verification)
    found = run_engine(["many_samples", "facts"], settings, SAME_REQUEST_IDS, **WIDE)
    assert found["facts"]["sampler_fallbacks"] == 0
    # Drafts were accepted often and rejected often: both ways to a token are tested.
    assert 0.2 < found["facts"]["accepted"] / found["facts"]["drafted"] < 0.9
    check_distribution(found["many_samples"], exact)


def check_distribution(found: Any, exact: Any) -> None:
    for kind in SAMPLED_KINDS:
        samples = found[kind]
        assert len(samples) == NUM_SAMPLES
        firsts = Counter(row[0] for row in samples)
        assert p_value(firsts, exact[kind]["first"]) > 1e-4, kind
        usual = exact["usual_first"]
        seconds = Counter(row[1] for row in samples if row[0] == usual)
        assert p_value(seconds, exact[kind]["second"]) > 1e-4, kind


def p_value(counts: Counter[int], probs: dict[str, float]) -> float:
    """Chi-squared, rare tokens taken together; a token of probability 0 may not occur at all."""
    total = sum(counts.values())
    assert total > 200
    assert all(probs.get(str(token), 0.0) > 0 for token in counts), "a token that the verifier excludes was written"
    common = [token for token, probability in probs.items() if probability * total >= LEAST_EXPECTED]
    observed = np.array([counts[int(token)] for token in common], dtype=float)
    expected = np.array([probs[token] * total for token in common])
    rest = total - expected.sum()
    if rest > 1e-6 * total:
        observed, expected = np.append(observed, total - observed.sum()), np.append(expected, rest)
    if len(expected) == 1:
        return 1.0
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)
