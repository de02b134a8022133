"""Drafts that a request can still use, and which requests are gone."""

from types import SimpleNamespace

from vllm_twotower.v1.requests import gone, usable_drafts


def test_a_request_is_not_drafted_beyond_its_end() -> None:
    request = SimpleNamespace(sampling_params=SimpleNamespace(max_tokens=10, min_tokens=0), output_token_ids=[7] * 6)
    runner = SimpleNamespace(max_model_len=100, requests={"a": request})
    assert usable_drafts(runner, "a", 50, 16) == 3  # 4 tokens are left, one of which the verifier adds
    assert usable_drafts(runner, "a", 98, 16) == 1
    assert usable_drafts(runner, "a", 100, 16) == 0
    assert usable_drafts(runner, "unknown", 50, 16) == 16
    request.sampling_params.max_tokens = None
    assert usable_drafts(runner, "a", 50, 16) == 16
    request.sampling_params.min_tokens = 9
    assert usable_drafts(runner, "a", 50, 16) == 2  # the token after them is the last one before the text may end
    request.sampling_params.min_tokens = 6
    assert usable_drafts(runner, "a", 50, 16) == 16
    request.sampling_params.thinking_token_budget = 100
    assert usable_drafts(runner, "a", 50, 16) == 0


def test_a_preempted_request_is_not_gone() -> None:
    runner = SimpleNamespace(requests={"running": 1, "preempted": 1})
    assert gone(["running", "preempted", "finished"], runner) == ["finished"]
