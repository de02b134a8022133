"""Attention, experts, norms, unmasking and products against their references."""

import pytest
import torch
from torch import Tensor

from tests.support.builders import padding_mask
from tests.support.tolerances import BFLOAT16_RELATIVE, FLOAT64
from twotower_kernels.block_attention import attention, causal_mask
from twotower_kernels.block_attention.reference import attention_reference
from twotower_kernels.experts import grouped_experts, route
from twotower_kernels.experts.reference import grouped_experts_reference, route_reference
from twotower_kernels.linear import linear
from twotower_kernels.linear.reference import linear_reference
from twotower_kernels.time_modulation import modulate_then_norm, norm_then_modulate, rms_norm
from twotower_kernels.time_modulation.reference import modulate_reference, rms_norm_reference
from twotower_kernels.unmasking import choose_commits, pick_tokens
from twotower_kernels.unmasking.reference import choose_commits_reference, pick_tokens_reference


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (6, 1)])
@pytest.mark.parametrize("masking", ["none", "causal", "padding"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 9), (5, 9)])
def test_attention_equals_softmax_written_out(
    heads: int, kv_heads: int, masking: str, num_queries: int, num_keys: int
) -> None:
    query = randn(2, num_queries, heads, 4)
    key, value = randn(2, num_keys, kv_heads, 4, seed=1), randn(2, num_keys, kv_heads, 4, seed=2)
    mask = {
        "none": None,
        "causal": causal_mask(torch.tensor([4, 2]), num_queries, num_keys),
        "padding": padding_mask(torch.tensor([9, 3]), num_keys),
    }[masking]
    expected = attention_reference(query, key, value, mask)
    torch.testing.assert_close(attention(query, key, value, mask), expected, atol=FLOAT64, rtol=FLOAT64)


def test_causal_mask_shows_the_context_and_the_block_up_to_the_query() -> None:
    assert causal_mask(torch.tensor([2]), 2, 5).tolist() == [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (3, 2), (4, 1)])
def test_routing_equals_the_rule_token_by_token(num_groups: int, top_groups: int, normalise: bool) -> None:
    scores, bias = randn(17, 12).sigmoid(), randn(12, seed=1) * 0.3
    ids, weights = route(scores, bias, 3, num_groups, top_groups, normalise, 2.5)
    expected_ids, expected_weights = route_reference(scores, bias, 3, num_groups, top_groups, normalise, 2.5)
    order, expected_order = ids.argsort(-1), expected_ids.argsort(-1)
    assert torch.equal(ids.gather(-1, order), expected_ids.gather(-1, expected_order))
    torch.testing.assert_close(
        weights.gather(-1, order), expected_weights.gather(-1, expected_order), atol=FLOAT64, rtol=FLOAT64
    )


@pytest.mark.parametrize("num_tokens", [1, 2, 17])
def test_experts_equal_the_sum_written_out(num_tokens: int) -> None:
    x, up, down = randn(num_tokens, 7), randn(6, 5, 7, seed=1), randn(6, 7, 5, seed=2)
    ids, weights = route(randn(num_tokens, 6, seed=3).sigmoid(), torch.zeros(6).double(), 2, 1, 1, True, 1.0)
    expected = grouped_experts_reference(x, up, down, ids, weights)
    torch.testing.assert_close(grouped_experts(x, up, down, ids, weights), expected, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("num_tokens", [2, 17])
def test_experts_in_bfloat16_equal_the_sum_written_out(num_tokens: int) -> None:
    x, up, down = (t.bfloat16() for t in (randn(num_tokens, 7), randn(6, 5, 7, seed=1), randn(6, 7, 5, seed=2)))
    ids, weights = route(randn(num_tokens, 6, seed=3).sigmoid(), torch.zeros(6).double(), 3, 1, 1, True, 1.0)
    actual = grouped_experts(x, up, down, ids, weights).double()
    expected = grouped_experts_reference(x.double(), up.double(), down.double(), ids, weights)
    assert ((actual - expected).norm() / expected.norm()).item() < BFLOAT16_RELATIVE


def test_experts_nobody_chose_are_not_read() -> None:
    x, up, down = randn(5, 7), randn(6, 5, 7, seed=1), randn(6, 7, 5, seed=2)
    up[3:] = torch.nan
    down[3:] = torch.nan
    ids = torch.tensor([[0, 2]] * 5)
    assert torch.isfinite(grouped_experts(x, up, down, ids, torch.full((5, 2), 0.5).double())).all()


def test_rms_norm_equals_its_definition() -> None:
    x, weight = randn(3, 11), randn(11, seed=1)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), atol=FLOAT64, rtol=FLOAT64
    )


def test_modulation_stands_on_the_side_of_the_norm_its_name_says() -> None:
    x, weight = randn(2, 3, 11), randn(11, seed=1)
    shift, scale = randn(2, 11, seed=2), randn(2, 11, seed=3)
    before = rms_norm_reference(modulate_reference(x, shift, scale), weight, 1e-5)
    after = modulate_reference(rms_norm_reference(x, weight, 1e-5), shift, scale)
    options = (shift, scale, weight, 1e-5, torch.float64)
    torch.testing.assert_close(modulate_then_norm(x, *options), before, atol=FLOAT64, rtol=FLOAT64)
    torch.testing.assert_close(norm_then_modulate(x, *options), after, atol=FLOAT64, rtol=FLOAT64)


def test_pick_is_the_most_probable_token_that_is_not_the_mask() -> None:
    logits = randn(9, 13)
    logits[:, 3] = 50
    picks, confidence = pick_tokens(logits.clone(), 3)
    expected_picks, expected_confidence = pick_tokens_reference(logits, 3)
    assert torch.equal(picks, expected_picks)
    torch.testing.assert_close(confidence, expected_confidence, atol=FLOAT64, rtol=FLOAT64)


def test_confidence_of_a_noisy_pick_comes_from_the_logits() -> None:
    logits, scores = randn(9, 13), randn(9, 13, seed=1)
    picks, confidence = pick_tokens(logits.clone(), 3, scores.clone())
    logits[:, 3] = -torch.inf
    scores[:, 3] = -torch.inf
    assert torch.equal(picks, scores.argmax(-1))
    expected = torch.softmax(logits, -1).gather(-1, picks[:, None])[:, 0]
    torch.testing.assert_close(confidence, expected, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("remaining_steps", [1, 2, 5, 20])
@pytest.mark.parametrize("ties", [False, True])
def test_commits_follow_the_published_rule(threshold: float, remaining_steps: int, ties: bool) -> None:
    confidence = randn(40, 7).sigmoid()
    if ties:
        confidence = (confidence * 3).round() / 3
    masked = randn(40, 7, seed=1) > 0
    masked[0], masked[1] = False, True
    commits = choose_commits(confidence, masked, threshold, remaining_steps)
    assert torch.equal(commits, choose_commits_reference(confidence, masked, threshold, remaining_steps))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (2, 3), (1, 17), (70,)])
def test_linear_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, 33).to(dtype), randn(21, 33, seed=1).to(dtype)
    actual, expected = linear(x, weight), linear_reference(x, weight)
    assert actual.shape == expected.shape and actual.dtype == dtype
    if actual.numel():
        assert ((actual - expected).double().norm() / expected.double().norm()).item() < BFLOAT16_RELATIVE
