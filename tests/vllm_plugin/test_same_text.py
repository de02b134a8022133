"""At temperature 0 a serving engine writes, token by token, what it writes without drafts, whatever requests do."""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm_plugin.engine import ROOMY, TIGHT, digest, run_engine, two_tower

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

PLENTY_OF_ROOM = [
    "batches",
    "joining_and_leaving",
    "abort",
    "prefix_cache",
    "lengths",
    "stops",
    "min_tokens",
    "logprobs",
    "penalties",
    "forbidden_tokens",
    "structured_outputs",
    "streaming",
    "greedy_beside_sampled",
]
LITTLE_ROOM = ["chunked_prefill", "preemption", "near_max_model_len"]

# Drafts per step, and how they are made: every policy takes part, in a way that does not hang on the clock.
DRAFTING = [
    (1, {"policy": "fixed"}),
    (8, {"policy": "fixed", "block_size": 8, "experts_dtype": "int8", "experts_per_token": 1}),
    (15, {}),
    (16, {"policy": "threshold", "steps_per_block": 3, "verification": "coupled", "first_token": "denoiser"}),
]
SURELY = {"prepare": "draft_most_rounds"}


@pytest.fixture(scope="module")
def without_drafts() -> dict[str, Any]:
    return run_engine(PLENTY_OF_ROOM, None, **ROOMY)


@pytest.fixture(scope="module")
def without_drafts_in_little_room() -> dict[str, Any]:
    return run_engine(LITTLE_ROOM, None, **TIGHT)


@pytest.mark.parametrize(("num_speculative_tokens", "knobs"), DRAFTING)
def test_with_room_for_all(
    num_speculative_tokens: int, knobs: dict[str, Any], without_drafts: dict[str, Any], record_property: Any
) -> None:
    found = run_engine([*PLENTY_OF_ROOM, "facts"], two_tower(num_speculative_tokens, **knobs), **ROOMY, **SURELY)
    for name in PLENTY_OF_ROOM:
        if name == "logprobs":
            assert_same_logprobs(found[name], without_drafts[name])
        else:
            assert found[name] == without_drafts[name], name
    record_property("greedy", digest(found["batches"]))
    facts = found["facts"]
    assert facts["accepted"] > 400 and facts["errors"] == facts["sampler_fallbacks"] == 0
    assert facts["vllm_accepted"] == facts["accepted"]
    assert facts["held"] <= 1  # what ended before the last request is forgotten


@pytest.mark.parametrize(("num_speculative_tokens", "knobs"), DRAFTING[1:])
def test_with_little_room(
    num_speculative_tokens: int, knobs: dict[str, Any], without_drafts_in_little_room: dict[str, Any]
) -> None:
    found = run_engine([*LITTLE_ROOM, "facts"], two_tower(num_speculative_tokens, **knobs), **TIGHT, **SURELY)
    for name in LITTLE_ROOM:
        assert found[name] == without_drafts_in_little_room[name], name
    facts = found["facts"]
    adapts = knobs.get("policy", "adaptive") == "adaptive"
    assert facts["accepted"] > 300 and facts["errors"] == facts["sampler_fallbacks"] == 0
    assert adapts or facts["prefilling"] > 0  # contexts were read while the verifier still read prompts


def assert_same_logprobs(found: Any, expected: Any) -> None:
    """The same tokens; values to 1e-4, since sums of a batch of another width are taken in another order."""
    for ours, theirs in zip(found, expected, strict=True):
        for rows, other_rows in zip(ours, theirs, strict=True):
            for pairs, other_pairs in zip(rows, other_rows, strict=True):
                assert [token for token, _ in pairs] == [token for token, _ in other_pairs]
                assert [value for _, value in pairs] == pytest.approx([value for _, value in other_pairs], abs=1e-4)


def test_rows_of_one_width_as_cuda_graphs_want_them() -> None:
    names = ["joining_and_leaving", "lengths", "min_tokens", "stops"]
    expected = run_engine(PLENTY_OF_ROOM, None, **ROOMY)
    found = run_engine([*names, "facts"], two_tower(15, policy="fixed", pad_drafts=True), **ROOMY)
    assert [found[name] for name in names] == [expected[name] for name in names]
    assert found["facts"]["errors"] == 0 and found["facts"]["accepted"] > 400
