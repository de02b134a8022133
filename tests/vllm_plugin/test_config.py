"""Knobs and what they make of the drafter; no vLLM is needed for them."""

from types import SimpleNamespace
from typing import Any

import pytest

from twotower_spec import ArgumentError
from twotower_spec.drafting import AdaptivePolicy, FixedPolicy, ThresholdPolicy
from vllm_twotower.config import DrafterKnobs, adaptive_block_sizes


@pytest.mark.parametrize(
    ("block_size", "num_speculative_tokens", "expected"),
    [
        (16, 16, [4, 8, 16]),
        (16, 15, [4, 8, 16]),
        (16, 8, [4, 8]),
        (16, 5, [4, 8]),
        (16, 1, [4]),
        (12, 12, [4, 8, 12]),
        (12, 7, [4, 8]),
        (3, 2, [3]),
        (32, 32, [4, 8, 16, 32]),
    ],
)
def test_the_adaptive_policy_chooses_among_blocks_that_are_of_use(
    block_size: int, num_speculative_tokens: int, expected: list[int]
) -> None:
    assert adaptive_block_sizes(block_size, num_speculative_tokens) == expected


def test_knobs_that_are_not_given_are_resolved() -> None:
    assert DrafterKnobs("T", policy="fixed").resolved(8) == DrafterKnobs(
        "T", policy="fixed", block_size=8, steps_per_block=1
    )
    assert DrafterKnobs("T", block_size=4).resolved(8).steps_per_block == 4
    assert DrafterKnobs("T", policy="off").policy_for(4, 8) is None


@pytest.mark.parametrize("num_speculative_tokens", [1, 5, 16])
def test_no_policy_drafts_more_than_a_block(num_speculative_tokens: int) -> None:
    for policy in ("adaptive", "fixed", "threshold"):
        knobs = DrafterKnobs.parse({"model": "T", "policy": policy})
        made = knobs.policy_for(num_speculative_tokens, 16)
        assert isinstance(made, AdaptivePolicy | FixedPolicy | ThresholdPolicy)
        assert made.num_speculative_tokens <= 16
        assert policy == "adaptive" or made.num_speculative_tokens == num_speculative_tokens


def test_the_pool_grows_with_the_server_up_to_a_bound() -> None:
    def config(max_num_seqs: int, max_model_len: int) -> Any:
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
            model_config=SimpleNamespace(max_model_len=max_model_len),
        )

    knobs = DrafterKnobs("T")
    assert knobs.pool_size(config(8, 512)) == (8, 8 * 512)
    assert knobs.pool_size(config(256, 100_000)) == (64, 64 * 2048)
    assert DrafterKnobs("T", pool_requests=3, pool_tokens=50).pool_size(config(8, 512)) == (3, 50)


def test_rows_are_padded_where_vllm_has_cuda_graphs() -> None:
    def config(device: str, eager: bool) -> Any:
        return SimpleNamespace(
            device_config=SimpleNamespace(device_type=device), model_config=SimpleNamespace(enforce_eager=eager)
        )

    knobs = DrafterKnobs("T")
    assert knobs.pads_drafts(config("cuda", False))
    assert not knobs.pads_drafts(config("cuda", True)) and not knobs.pads_drafts(config("cpu", False))
    assert DrafterKnobs("T", pad_drafts=True).pads_drafts(config("cpu", True))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "no TwoTower checkpoint is named"),
        (
            {"model": "T", "steps_per_blok": 3},
            "twotower knob 'steps_per_blok' is not there, did you mean steps_per_block",
        ),
        ({"model": "T", "num_token_ids": 2048}, "twotower knob 'num_token_ids' is not there"),
        ({"model": "T", "block_size": "8"}, "twotower knob block_size '8'"),
        ({"model": "T", "steps_per_block": 0}, "steps_per_block 0"),
        (
            {"model": "T", "experts_dtype": "int2"},
            "twotower knob experts_dtype 'int2' .* one of float8_e4m3fn, int8, int4",
        ),
        ({"model": "T", "experts_per_token": 0}, "twotower knob experts_per_token 0"),
        ({"model": "T", "denoiser_device": 1}, "denoiser_device 1"),
        ({"model": "T", "prefill_budget": -4}, "prefill_budget -4"),
        ({"model": "T", "pad_drafts": "yes"}, "pad_drafts 'yes'"),
        ({"model": "T", "pad_drafts": 1}, "pad_drafts 1"),
        ({"model": "T", "log_interval_s": "often"}, "log_interval_s 'often'"),
        ({"model": "T", "log_interval_s": -1}, "log_interval_s -1"),
        ({"model": "T", "log_interval_s": float("nan")}, "log_interval_s nan"),
        ({"model": "T", "block_size": 0}, "block_size 0"),
        ({"model": "T", "pool_tokens": 0}, "pool_tokens 0"),
        ({"model": ""}, "model ''"),
        ({"model": "T", "context_device": ""}, "context_device ''"),
    ],
)
def test_knobs_are_refused_by_name(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DrafterKnobs.parse(knobs)
