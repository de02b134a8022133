"""The ops in the dtypes models run in, and their edges: one token, one expert, ties, nothing masked."""

import pytest
import torch
from torch import Tensor

from tests.support.builders import padding_mask
from tests.support.tolerances import BFLOAT16_RELATIVE, FLOAT32_OP, FLOAT64
from twotower_kernels.block_attention import attention, causal_mask
from twotower_kernels.block_attention.reference import attention_reference
from twotower_kernels.experts import ExpertChoice, grouped_experts, route
from twotower_kernels.experts.reference import grouped_experts_reference, route_reference
from twotower_kernels.linear import linear
from twotower_kernels.time_modulation import add_then_norm, modulate_then_norm, norm_then_modulate, rms_norm
from twotower_kernels.time_modulation.reference import modulate_reference, rms_norm_reference
from twotower_kernels.unmasking import choose_commits, pick_tokens
from twotower_kernels.unmasking.reference import pick_tokens_reference


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_float32_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=FLOAT32_OP, rtol=FLOAT32_OP)


@pytest.mark.parametrize("kv_heads", [8, 4, 2])
@pytest.mark.parametrize("masking", ["none", "causal", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_narrow_dtypes_stays_near_float64(kv_heads: int, masking: str, dtype: torch.dtype) -> None:
    tensors = randn(3, 5, 8, 6), randn(3, 17, kv_heads, 6, seed=1), randn(3, 17, kv_heads, 6, seed=2)
    query, key, value = (t.to(dtype) for t in tensors)
    mask = {
        "none": None,
        "causal": causal_mask(torch.tensor([12, 0, 5]), 5, 17),
        "padding": padding_mask(torch.tensor([17, 1, 8]), 17),
    }[masking]
    actual = attention(query, key, value, mask)
    assert actual.dtype == dtype
    expected = attention_reference(query.double(), key.double(), value.double(), mask)
    assert relative_error(actual, expected) < (FLOAT32_OP if dtype == torch.float32 else BFLOAT16_RELATIVE)


def test_what_a_mask_hides_has_no_influence() -> None:
    query, key, value = randn(2, 3, 4, 6), randn(2, 9, 2, 6, seed=1), randn(2, 9, 2, 6, seed=2)
    mask = padding_mask(torch.tensor([4, 9]), 9)
    expected = attention(query, key, value, mask)
    key[0, 4:], value[0, 4:] = 1e4, -1e4
    assert torch.equal(attention(query, key, value, mask), expected)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_routing_in_float32_chooses_as_the_rule_does(num_groups: int) -> None:
    scores, bias = randn(17, 12).sigmoid().float(), (randn(12, seed=1) * 0.3).float()
    choice = ExpertChoice(3, num_groups, min(2, num_groups), True, 2.5)
    ids, weights = route(scores, bias, choice)
    expected_ids, expected_weights = route_reference(scores, bias, choice)
    assert torch.equal(ids.sort(-1).values, expected_ids.sort(-1).values)
    assert_float32_close(weights.sort(-1).values, expected_weights.sort(-1).values.double())


def test_negative_corrected_scores_lose_to_the_zeros_of_closed_groups() -> None:
    # As published, scores in groups that are not kept become 0, which is above a negative corrected score.
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.3]]).double()
    bias = torch.tensor([0.0, -0.5, -0.5, -0.5]).double()
    ids, weights = route(scores, bias, ExpertChoice(2, 2, 1, False, 1.0))
    assert 0 in ids and 1 not in ids
    assert torch.equal(weights, scores.gather(-1, ids))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 17])
@pytest.mark.parametrize("choice", ["one expert", "two experts", "every expert"])
def test_experts_of_any_load_equal_the_sum_written_out(choice: str, num_tokens: int, dtype: torch.dtype) -> None:
    x, up, down = (t.to(dtype) for t in (randn(num_tokens, 7), randn(6, 5, 7, seed=1), randn(6, 7, 5, seed=2)))
    chosen = {"one expert": [4], "two experts": [5, 0], "every expert": [3, 1, 0, 5, 2, 4]}[choice]
    ids = torch.tensor([chosen] * num_tokens)
    weights = randn(num_tokens, len(chosen), seed=3).sigmoid()
    actual = grouped_experts(x, up, down, ids, weights)
    assert actual.shape == x.shape and actual.dtype == dtype
    expected = grouped_experts_reference(x.double(), up.double(), down.double(), ids, weights)
    bound = {torch.float64: FLOAT64, torch.float32: FLOAT32_OP, torch.bfloat16: BFLOAT16_RELATIVE}[dtype]
    assert relative_error(actual, expected) < bound


def test_experts_leave_their_inputs_alone() -> None:
    x, up, down = (t.bfloat16() for t in (randn(9, 7), randn(6, 5, 7, seed=1), randn(6, 7, 5, seed=2)))
    ids, weights = route(randn(9, 6, seed=3).sigmoid(), torch.zeros(6).double(), ExpertChoice(3, 1, 1, True, 1.0))
    before = [t.clone() for t in (x, up, down, ids, weights)]
    grouped_experts(x, up, down, ids, weights)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, up, down, ids, weights), strict=True))


def test_norm_and_modulation_in_float32_stay_near_float64() -> None:
    x, weight, shift, scale = randn(2, 3, 11), randn(11, seed=1), randn(2, 11, seed=2), randn(2, 11, seed=3)
    narrow = (x.float(), shift.float(), scale.float(), weight.float(), 1e-5, torch.float32)
    before = rms_norm_reference(modulate_reference(x, shift, scale), weight, 1e-5)
    after = modulate_reference(rms_norm_reference(x, weight, 1e-5), shift, scale)
    assert_float32_close(modulate_then_norm(*narrow), before)
    assert_float32_close(norm_then_modulate(*narrow), after)


def test_norm_of_bfloat16_is_computed_wide_and_rounded_once() -> None:
    x, weight = randn(3, 300).bfloat16(), randn(300, seed=1).bfloat16()
    expected = rms_norm_reference(x.double(), weight.double(), 1e-5)
    actual = rms_norm(x, weight, 1e-5, torch.bfloat16)
    assert actual.dtype == torch.bfloat16
    # Half a unit in the last of 8 bits, and a little for float32 inside.
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=2.0**-8)


def test_norm_of_zeros_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 5), torch.ones(5), 1e-5, torch.float32), torch.zeros(2, 5))


def test_gate_multiplies_the_branch_and_not_the_residual() -> None:
    residual, x, gate = randn(2, 3, 5), randn(2, 3, 5, seed=1), randn(2, 5, seed=2)
    expected = torch.stack([residual[i] + gate[i] * x[i] for i in range(2)])
    total, _ = add_then_norm(rms_norm, residual, x, gate, torch.ones(5).double(), 1e-5, torch.float64)
    torch.testing.assert_close(total, expected, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("num_tokens", [1, 2, 17])
def test_product_in_float32_stays_near_float64(num_tokens: int) -> None:
    x, weight = randn(num_tokens, 33), randn(21, 33, seed=1)
    assert_float32_close(linear(x.float(), weight.float()), x @ weight.T)


def test_product_takes_weights_of_any_strides() -> None:
    x, weight = randn(3, 33).bfloat16(), randn(33, 21, seed=1).bfloat16().t()
    assert relative_error(linear(x, weight), linear(x, weight.contiguous())) < BFLOAT16_RELATIVE


def test_picks_in_float32_are_those_of_float64() -> None:
    logits = randn(40, 61)
    picks, confidence = pick_tokens(logits.float(), 3)
    expected_picks, expected_confidence = pick_tokens_reference(logits, 3)
    assert torch.equal(picks, expected_picks)
    assert_float32_close(confidence, expected_confidence)


def test_confidence_of_huge_logits_is_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 5e4], [-1e4, -1e4, -1e4, 0.0]])
    picks, confidence = pick_tokens(logits, 3)
    assert picks[0] == 0 and confidence[0] == 1
    # Neighbouring float32 numbers at 1e4 are 1e-3 apart, and the sum is formed there.
    assert confidence[1].item() == pytest.approx(1 / 3, abs=1e-3)


def test_no_positions_give_no_picks() -> None:
    picks, confidence = pick_tokens(torch.empty(0, 13), 3)
    assert picks.shape == confidence.shape == (0,)


def test_threshold_is_strict() -> None:
    confidence, masked = torch.tensor([[0.5, 0.5, 0.75, 0.25]]), torch.ones(1, 4, dtype=torch.bool)
    assert choose_commits(confidence, masked, 0.5, 100).tolist() == [[False, False, True, False]]


def test_last_step_commits_everything_masked() -> None:
    confidence, masked = randn(5, 7).sigmoid(), randn(5, 7, seed=1) > 0
    assert torch.equal(choose_commits(confidence, masked, 1.0, 1), masked)


def test_of_equal_confidences_the_later_position_goes_first() -> None:
    masked = torch.tensor([[True, True, False, True, True]])
    assert choose_commits(torch.full((1, 5), 0.5), masked, 0.9, 2).tolist() == [[False, False, False, True, True]]


def test_confidence_at_open_positions_alone_counts() -> None:
    # Confidences at committed positions are left over from earlier steps and must not count, not even as NaN.
    confidence, masked = torch.tensor([[torch.nan, 0.2, 1.0, 0.3]]), torch.tensor([[False, True, False, True]])
    assert choose_commits(confidence, masked, 0.9, 9).tolist() == [[False, False, False, True]]


def test_rows_without_masked_positions_commit_nothing() -> None:
    masked = torch.zeros(2, 5, dtype=torch.bool)
    assert not choose_commits(torch.ones(2, 5), masked, 0.0, 1).any()
