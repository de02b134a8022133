"""Coupled verification: a seeded request gets one text, for any drafts, policy and batch, and without drafts."""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, digest, run_engine, two_tower
from tests.vllm_plugin.test_same_text import assert_same_logprobs

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


@pytest.mark.parametrize(
    ("num_speculative_tokens", "knobs"),
    [
        (3, {"policy": "fixed", "block_size": 4}),
        (15, {}),
        (16, {"policy": "threshold", "steps_per_block": 4, "first_token": "denoiser"}),
    ],
)
def test_a_seed_gives_one_text(num_speculative_tokens: int, knobs: dict[str, Any], record_property: Any) -> None:
    off = run_engine(["seeded_samples"], two_tower(15, verification="coupled", policy="off"), **ROOMY)
    settings = two_tower(num_speculative_tokens, verification="coupled", **knobs)
    found = run_engine(["seeded_samples", "facts"], settings, prepare="draft_most_rounds", **ROOMY)
    *texts, logprobs, alone = found["seeded_samples"]
    *texts_off, logprobs_off, alone_off = off["seeded_samples"]
    assert texts == texts_off and alone == alone_off
    record_property("seeded", digest(texts))
    assert_same_logprobs([[rows] for rows in logprobs], [[rows] for rows in logprobs_off])
    facts = found["facts"]
    assert facts["accepted"] > 300 and facts["errors"] == facts["sampler_fallbacks"] == 0
