"""Routing and experts: what users call, and the kernels, against the references."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tolerances import BFLOAT16_RELATIVE, FLOAT32_OP, FLOAT64
from twotower_kernels import tuning
from twotower_kernels.experts import (
    FOUR_BITS,
    ExpertChoice,
    ExpertOutputs,
    ExpertScales,
    SharedExpert,
    dequantise,
    float_shape,
    grouped_experts,
    quantise,
    quantised_shapes,
    route,
    route_tokens,
    scales_dtype,
)
from twotower_kernels.experts.quantisation import GROUP_SIZE, LARGEST, QUANTISED_DTYPES
from twotower_kernels.experts.reference import (
    grouped_experts_reference,
    route_reference,
    route_tokens_reference,
)
from twotower_kernels.linear import mlp

triton = pytest.importorskip("triton")
kernel = pytest.importorskip("twotower_kernels.experts.kernel")
variants = pytest.importorskip("twotower_kernels.experts.variants")

# Small tiles, so that small and odd sizes fill several of them, the last one partly.
TILES = {"BLOCK_ROWS": 16, "BLOCK_OUT": 16, "BLOCK_IN": 16, "num_warps": 4, "num_stages": 2}
HIDDEN, WIDTH, SHARED_WIDTH, EXPERTS = 35, 21, 38, 6
BOUND = {torch.float32: FLOAT32_OP, torch.bfloat16: BFLOAT16_RELATIVE, torch.float16: BFLOAT16_RELATIVE}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double().cpu() - expected.double().cpu()).norm() / expected.double().norm()).item()


def by_id(chosen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sorts ids and weights of every token by id."""
    ids, weights = (t.cpu() for t in chosen)
    order = ids.argsort(-1)
    return ids.gather(-1, order), weights.gather(-1, order)


def assert_same_choice(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    (ids, weights), (expected_ids, expected_weights) = by_id(actual), by_id(expected)
    assert torch.equal(ids, expected_ids)
    assert weights.dtype == expected_weights.dtype
    torch.testing.assert_close(weights, expected_weights, atol=tolerance, rtol=tolerance, equal_nan=True)


def weights_of_experts(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    shapes = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    up, down = (randn(*shape, seed=1 + i).to(device, dtype) for i, shape in enumerate(shapes))
    return up, down


def shared_expert(dtype: torch.dtype, device: torch.device) -> SharedExpert:
    up, down = randn(SHARED_WIDTH, HIDDEN, seed=5), randn(HIDDEN, SHARED_WIDTH, seed=6)
    return SharedExpert(up.to(device, dtype), down.to(device, dtype))


def widened(shared: SharedExpert) -> SharedExpert:
    return SharedExpert(shared.up.cpu().double(), shared.down.cpu().double())


def distinct_ids(num_tokens: int, top_k: int, seed: int = 4) -> Tensor:
    return randn(num_tokens, EXPERTS, seed=seed).argsort(-1)[:, :top_k]


def quantised_experts(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, ExpertScales]:
    (up, up_scales), (down, down_scales) = (
        quantise(t.cpu(), dtype) for t in weights_of_experts(torch.float32, torch.device("cpu"))
    )
    return up.to(device), down.to(device), ExpertScales(up_scales.to(device), down_scales.to(device))


def launched(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    shared: SharedExpert | None = None,
    scales: ExpertScales | None = None,
) -> Tensor:
    """Runs the kernels with small tiles instead of those in the table, and sums."""
    kind = kernel.kind_of_product(len(x), ids.shape[1], len(up), x.dtype, is_quantised=scales is not None)
    with (
        tuning.trying("experts", kind, TILES if scales is None else TILES | {"BLOCK_IN": 32}),
        tuning.trying("experts", "rank_pairs", {"BLOCK_ITEMS": 8, "BLOCK_PAIRS": 16, "num_warps": 1}),
    ):
        outputs: ExpertOutputs = kernel.launch_grouped_experts(x, up, down, ids, weights, shared, scales)
    return outputs.total()


# What users call


@pytest.mark.parametrize("held", LARGEST)
def test_quantised_weights_are_within_half_a_step_of_the_weights(held: torch.dtype) -> None:
    weight = randn(5, 7, 64).float()
    weight[1, 3] = 0
    rounded, scales = quantise(weight, held)
    assert rounded.dtype == held and scales.shape == (5, 7) and scales.dtype == torch.float32
    assert torch.equal(rounded.float().abs().amax(-1), torch.where(weight.abs().amax(-1) > 0, LARGEST[held], 0.0))
    again = dequantise(rounded, scales, torch.float32)
    # int8: half of the scale; float8_e4m3fn: three bits behind the leading one, and 2^-9 the smallest number.
    step = scales[..., None] if held == torch.int8 else torch.maximum(weight.abs() / 8, scales[..., None] / 512)
    assert ((again - weight).abs() <= step * 0.5001).all()
    assert (again[1, 3] == 0).all()


@pytest.mark.parametrize("num_inputs", [2, 62, 64, 66, 192])
def test_weights_of_four_bits_are_within_half_a_step_of_the_weights(num_inputs: int) -> None:
    weight = randn(5, 7, num_inputs).float()
    weight[1, 3] = 0
    rounded, scales = quantise(weight, FOUR_BITS)
    assert ((rounded.shape, scales.shape)) == quantised_shapes((5, 7, num_inputs), FOUR_BITS)
    assert rounded.dtype == torch.uint8 and scales.dtype == scales_dtype(FOUR_BITS) == torch.bfloat16
    assert float_shape(rounded) == weight.shape
    again = dequantise(rounded, scales, torch.float32)
    steps = scales.float().repeat_interleave(GROUP_SIZE, dim=-1)[..., :num_inputs]
    assert torch.equal(again / steps, (again / steps).round())
    # The largest element is 8 steps, its opposite would be 7; bfloat16 rounds a scale by 1/512 of it.
    assert ((again - weight).abs() <= steps.abs() * torch.where(weight * steps > 7 * steps**2, 1.02, 0.5001)).all()
    assert (again[1, 3] == 0).all()
    largest = weight.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(again.gather(-1, largest), weight.gather(-1, largest), atol=0, rtol=1 / 256)


def test_numbers_of_four_bits_lie_two_in_a_byte() -> None:
    weight = torch.tensor([[-8.0, 7.0, 0.0, 1.0, -1.0, -7.0]])
    rounded, scales = quantise(weight, FOUR_BITS)
    assert rounded.tolist() == [[0xF0, 0x98, 0x17]] and scales.tolist() == [[1.0]]
    opposite, scales = quantise(-weight, FOUR_BITS)
    assert torch.equal(opposite, rounded) and scales.tolist() == [[-1.0]]
    assert dequantise(opposite, scales, torch.float64).tolist() == (-weight).tolist()


def test_numbers_that_are_none_stay_so_in_every_dtype() -> None:
    weight = torch.ones(1, 128)
    weight[0, 3] = float("nan")
    for held in QUANTISED_DTYPES:
        assert dequantise(*quantise(weight, held), torch.float32)[0, 3].isnan()


@pytest.mark.parametrize("num_tokens", [1, 2, 17])
@pytest.mark.parametrize("held", LARGEST)
def test_quantised_experts_equal_the_sum_written_out(held: torch.dtype, num_tokens: int) -> None:
    x, (up, down, scales) = randn(num_tokens, HIDDEN), quantised_experts(held, torch.device("cpu"))
    ids, weights = distinct_ids(num_tokens, 2), randn(num_tokens, 2, seed=3).sigmoid()
    shared, narrow_shared = (shared_expert(dtype, x.device) for dtype in (torch.float64, torch.bfloat16))
    expected = grouped_experts_reference(x, up, down, ids, weights, shared, scales)
    actual = grouped_experts(x, up, down, ids, weights, shared, scales)
    torch.testing.assert_close(actual, expected, atol=FLOAT64, rtol=FLOAT64)
    narrow = grouped_experts(x.bfloat16(), up, down, ids, weights, narrow_shared, scales)
    assert relative_error(narrow, expected) < BFLOAT16_RELATIVE


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (3, 2), (4, 1)])
def test_routing_equals_the_rule_token_by_token(num_groups: int, top_groups: int, normalise: bool) -> None:
    scores, bias = randn(17, 12).sigmoid(), randn(12, seed=1) * 0.3
    choice = ExpertChoice(3, num_groups, top_groups, normalise, 2.5)
    assert_same_choice(route(scores, bias, choice), route_reference(scores, bias, choice), FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tokens_are_routed_by_float64_scores_whatever_their_dtype(dtype: torch.dtype) -> None:
    x, router, bias = randn(17, HIDDEN).to(dtype), randn(12, HIDDEN, seed=1).float(), randn(12, seed=2).float()
    choice = ExpertChoice(3, 3, 2, True, 1.7)
    expected = route_tokens_reference(x, router, bias, choice)
    assert_same_choice(route_tokens(x, router, bias, choice), expected, FLOAT64)


@pytest.mark.parametrize("num_tokens", [1, 2, 17])
def test_experts_equal_the_sum_written_out(num_tokens: int) -> None:
    x, up, down = randn(num_tokens, 7), randn(6, 5, 7, seed=1), randn(6, 7, 5, seed=2)
    ids, weights = route(
        randn(num_tokens, 6, seed=3).sigmoid(), torch.zeros(6).double(), ExpertChoice(2, 1, 1, True, 1.0)
    )
    expected = grouped_experts_reference(x, up, down, ids, weights)
    torch.testing.assert_close(grouped_experts(x, up, down, ids, weights), expected, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("num_tokens", [2, 17])
def test_experts_in_bfloat16_equal_the_sum_written_out(num_tokens: int) -> None:
    x, up, down = (t.bfloat16() for t in (randn(num_tokens, 7), randn(6, 5, 7, seed=1), randn(6, 7, 5, seed=2)))
    ids, weights = route(
        randn(num_tokens, 6, seed=3).sigmoid(), torch.zeros(6).double(), ExpertChoice(3, 1, 1, True, 1.0)
    )
    actual = grouped_experts(x, up, down, ids, weights)
    expected = grouped_experts_reference(x.double(), up.double(), down.double(), ids, weights)
    assert relative_error(actual, expected) < BFLOAT16_RELATIVE


def test_experts_nobody_chose_are_not_read() -> None:
    x, up, down = randn(5, 7), randn(6, 5, 7, seed=1), randn(6, 7, 5, seed=2)
    up[3:] = torch.nan
    down[3:] = torch.nan
    ids = torch.tensor([[0, 2]] * 5)
    assert torch.isfinite(grouped_experts(x, up, down, ids, torch.full((5, 2), 0.5).double())).all()


def test_a_shared_expert_is_added_unscaled_once_the_sum_is_rounded() -> None:
    x, shared = randn(5, HIDDEN).bfloat16(), shared_expert(torch.bfloat16, torch.device("cpu"))
    up, down = weights_of_experts(torch.bfloat16, torch.device("cpu"))
    ids, weights = distinct_ids(5, 3), randn(5, 3, seed=3).sigmoid()
    expected = grouped_experts(x, up, down, ids, weights) + mlp(x, shared.up, shared.down)
    assert torch.equal(grouped_experts(x, up, down, ids, weights, shared), expected)


# The kernels


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (3, 2), (3, 1), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_routing_kernel_follows_the_rule(
    device: torch.device, num_groups: int, top_groups: int, normalise: bool, dtype: torch.dtype
) -> None:
    scores, bias = randn(17, 12).sigmoid().to(dtype), (randn(12, seed=1) * 0.3).to(dtype)
    choice = ExpertChoice(5, num_groups, top_groups, normalise, 1.7)
    actual = kernel.launch_choose(scores.to(device)[None], False, bias.to(device), choice)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32_OP
    assert_same_choice(actual, route_reference(scores, bias, choice), tolerance)


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "top_groups", "top_k"), [(1, 1, 1, 1), (6, 3, 2, 6), (5, 1, 1, 2)]
)
def test_routing_kernel_takes_few_and_all_experts(
    device: torch.device, num_experts: int, num_groups: int, top_groups: int, top_k: int
) -> None:
    scores, bias = randn(3, num_experts).sigmoid(), randn(num_experts, seed=1)
    choice = ExpertChoice(top_k, num_groups, top_groups, True, 2.5)
    actual = kernel.launch_choose(scores.to(device)[None], False, bias.to(device), choice)
    assert_same_choice(actual, route_reference(scores, bias, choice), FLOAT64)


@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (4, 2)])
def test_of_equal_scores_the_routing_kernel_takes_the_lower_ids(
    device: torch.device, num_groups: int, top_groups: int
) -> None:
    scores = (randn(40, 12).sigmoid() * 3).round() / 3
    scores[0] = 0.5
    choice = ExpertChoice(4, num_groups, top_groups, True, 2.5)
    bias = torch.zeros(12).double()
    ids, weights = kernel.launch_choose(scores.to(device)[None], False, bias.to(device), choice)
    assert ids[0].tolist() == [0, 1, 2, 3]
    assert_same_choice((ids, weights), route_reference(scores, bias, choice), FLOAT64)


@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (3, 1)])
def test_routing_kernel_names_distinct_experts_for_any_scores(
    device: torch.device, num_groups: int, top_groups: int
) -> None:
    # The result for such a token is undefined, but no expert may read beyond its weights or change other tokens.
    scores, bias = randn(7, 12).sigmoid(), randn(12, seed=1) * 0.3
    choice = ExpertChoice(5, num_groups, top_groups, True, 2.5)
    expected_ids, expected_weights = by_id(route_reference(scores, bias, choice))
    scores[0], scores[1, ::2], scores[2] = torch.nan, torch.nan, -torch.inf
    scores[3], scores[4, 3], scores[5, 7] = torch.inf, torch.nan, -torch.inf
    ids, weights = by_id(kernel.launch_choose(scores.to(device)[None], False, bias.to(device), choice))
    assert ((ids >= 0) & (ids < 12)).all()
    assert (ids.diff(dim=-1) > 0).all()
    assert 3 in ids[4]
    assert 7 not in ids[5] or num_groups > 1
    assert torch.equal(ids[6], expected_ids[6])
    torch.testing.assert_close(weights[6], expected_weights[6], atol=FLOAT64, rtol=FLOAT64)


def test_an_expert_barred_by_its_correction_is_never_chosen(device: torch.device) -> None:
    scores, bias = randn(9, 7).sigmoid(), torch.zeros(7).double()
    bias[[0, 6]] = -torch.inf
    ids, _ = kernel.launch_choose(scores.to(device)[None], False, bias.to(device), ExpertChoice(5, 1, 1, True, 1.0))
    assert by_id((ids, ids))[0].tolist() == [[1, 2, 3, 4, 5]] * 9


def test_routing_kernel_reads_scores_of_any_strides(device: torch.device) -> None:
    scores, bias = randn(12, 40).sigmoid().t()[::3], randn(24, seed=1)[::2] * 0.3
    choice = ExpertChoice(3, 1, 1, True, 2.5)
    actual = kernel.launch_choose(scores.to(device)[None], False, bias.to(device), choice)
    assert_same_choice(actual, route_reference(scores, bias, choice), FLOAT64)


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("part", [16, 48, 40])
def test_router_kernels_route_tokens_by_the_rule(
    device: torch.device, num_tokens: int, dtype: torch.dtype, part: int
) -> None:
    # As in the towers: tokens are rows of a wider tensor, and the router is float32.
    x = randn(num_tokens, 3, HIDDEN).to(dtype)[:, 1]
    router, bias = randn(18, HIDDEN, seed=1).float() / 4, randn(18, seed=2).float() * 0.3
    choice = ExpertChoice(4, 3, 2, True, 1.7)
    tiles = {"PART": part, "BLOCK_TOKENS": 16, "BLOCK_EXPERTS": 16, "BLOCK_HIDDEN": 16, "num_warps": 1}
    with tuning.trying("experts", "router_logits", tiles):
        actual = kernel.launch_route_tokens(x.to(device), router.to(device), bias.to(device), choice)
    assert_same_choice(actual, route_tokens_reference(x, router, bias, choice), FLOAT64)


def test_many_tokens_are_routed_from_one_product(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "MOST_TOKENS_IN_PARTS", 4)
    x, router, bias = randn(5, HIDDEN).bfloat16(), randn(12, HIDDEN, seed=1).float(), torch.zeros(12)
    choice = ExpertChoice(3, 1, 1, True, 2.5)
    actual = kernel.launch_route_tokens(x.to(device), router.to(device), bias.to(device), choice)
    assert_same_choice(actual, route_tokens_reference(x, router, bias, choice), FLOAT64)


def test_scores_of_one_token_do_not_reach_another(device: torch.device) -> None:
    x, router, bias = randn(5, HIDDEN).float(), randn(6, HIDDEN, seed=1).float(), torch.zeros(6)
    choice = ExpertChoice(2, 1, 1, True, 2.5)
    expected = by_id(kernel.launch_route_tokens(x.to(device), router.to(device), bias.to(device), choice))
    x[2], x[4] = torch.nan, torch.inf
    actual = by_id(kernel.launch_route_tokens(x.to(device), router.to(device), bias.to(device), choice))
    others = [0, 1, 3]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("num_pairs", [1, 2, 16, 17, 51])
@pytest.mark.parametrize("block_rows", [1, 3, 16])
@pytest.mark.parametrize("by_sorting", [False, True])
def test_pairs_stand_in_the_order_of_experts_and_blocks_have_those_of_one(
    device: torch.device, num_pairs: int, block_rows: int, by_sorting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "MOST_PAIRS_BY_RANK", 0 if by_sorting else 100)
    ids = randn(num_pairs).abs().mul(3).long().clamp(max=EXPERTS - 2)
    tiles = {"BLOCK_ITEMS": 4, "BLOCK_PAIRS": 16, "num_warps": 1}
    with tuning.trying("experts", "rank_pairs", tiles):
        order, blocks = kernel.order_pairs(ids.to(device), EXPERTS, block_rows)
    assert (order.dtype, blocks.dtype) == (torch.int32, torch.int64)
    assert order.tolist() == ids.sort(stable=True).indices.tolist()
    expected, first = [], 0
    for expert, count in enumerate(ids.bincount().tolist()):
        for skipped in range(0, count, block_rows):
            expected.append((expert, min(count - skipped, block_rows), first + skipped))
        first += count
    entries = [(entry >> 40, entry >> 32 & 0xFF, entry & 0xFFFFFFFF) for entry in blocks.tolist()]
    assert entries == expected + [(0, 0, 0)] * (kernel.most_blocks(num_pairs, EXPERTS, block_rows) - len(expected))


@pytest.mark.parametrize("block_rows", [1, 2, 3, 16])
def test_no_choice_of_experts_makes_more_blocks_than_the_bound(block_rows: int) -> None:
    for num_pairs in range(1, 60):
        # The worst choice: one pair for every expert, the rest for one of them or for all in turn.
        for spread in (1, 2, EXPERTS):
            visited = min(num_pairs, EXPERTS)
            counts = [1] * visited
            for extra in range(num_pairs - visited):
                counts[extra % min(spread, visited)] += 1
            blocks = sum(-(-count // block_rows) for count in counts)
            assert blocks <= kernel.most_blocks(num_pairs, EXPERTS, block_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 2, 17])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_expert_kernels_equal_the_sum_written_out(
    device: torch.device, dtype: torch.dtype, num_tokens: int, top_k: int
) -> None:
    x, (up, down) = randn(num_tokens, HIDDEN).to(device, dtype) / 4, weights_of_experts(dtype, device)
    ids, weights = distinct_ids(num_tokens, top_k), randn(num_tokens, top_k, seed=3).sigmoid()
    actual = launched(x, up, down, ids.to(device), weights.to(device))
    assert actual.shape == x.shape and actual.dtype == dtype
    expected = grouped_experts_reference(*(t.cpu().double() for t in (x, up, down)), ids, weights)
    assert relative_error(actual, expected) < BOUND[dtype]


@pytest.mark.parametrize("chosen", [[4], [5, 0], [0]])
def test_an_expert_of_all_tokens_fills_several_blocks(device: torch.device, chosen: list[int]) -> None:
    x, (up, down) = randn(37, HIDDEN).float().to(device), weights_of_experts(torch.float32, device)
    ids, weights = torch.tensor([chosen] * 37), randn(37, len(chosen), seed=3).sigmoid()
    expected = grouped_experts_reference(*(t.cpu().double() for t in (x, up, down)), ids, weights)
    assert relative_error(launched(x, up, down, ids.to(device), weights.to(device)), expected) < FLOAT32_OP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 17])
@pytest.mark.parametrize("held", LARGEST)
def test_kernels_of_quantised_experts_equal_the_sum_written_out(
    device: torch.device, held: torch.dtype, num_tokens: int, dtype: torch.dtype
) -> None:
    x, (up, down, scales) = randn(num_tokens, HIDDEN).to(device, dtype) / 4, quantised_experts(held, device)
    ids, weights = distinct_ids(num_tokens, 3).to(device), randn(num_tokens, 3, seed=3).sigmoid().to(device)
    shared = shared_expert(dtype, device)
    actual = launched(x, up, down, ids, weights, shared, scales)
    assert actual.dtype == dtype
    expected = grouped_experts_reference(x.double(), up, down, ids, weights, widened(shared), scales)
    assert relative_error(actual, expected) < BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 5, 17])
@pytest.mark.parametrize(("hidden", "width"), [(64, 128), (70, 22), (150, 66)])
def test_kernels_of_experts_of_four_bits_equal_the_sum_written_out(
    device: torch.device, hidden: int, width: int, num_tokens: int, dtype: torch.dtype
) -> None:
    (up, up_scales), (down, down_scales) = (
        quantise(randn(EXPERTS, *shape, seed=seed) / shape[1] ** 0.5, FOUR_BITS)
        for seed, shape in ((1, (width, hidden)), (2, (hidden, width)))
    )
    scales = ExpertScales(up_scales.to(device), down_scales.to(device))
    x = randn(num_tokens, 2 * hidden).to(device, dtype)[:, ::2] / 4
    ids, weights = distinct_ids(num_tokens, 3).to(device), randn(num_tokens, 3, seed=3).sigmoid().to(device)
    actual = launched(x, up.to(device), down.to(device), ids, weights, None, scales)
    double = ExpertScales(up_scales.double(), down_scales.double())
    expected = grouped_experts_reference(x.cpu().double(), up, down, ids.cpu(), weights.cpu(), None, double)
    assert relative_error(actual, expected) < BOUND[dtype]


@pytest.mark.parametrize("held", LARGEST)
def test_scales_of_quantised_experts_come_before_rounding(device: torch.device, held: torch.dtype) -> None:
    # All sums are exact in bfloat16, their products with these scales are not.
    x, ids = torch.ones(2, 4).bfloat16().to(device), torch.tensor([[0]] * 2).to(device)
    up, down = torch.ones(1, 1, 4).to(device, held), torch.ones(1, 4, 1).to(device, held)
    scales = ExpertScales(torch.full((1, 1), 0.3).to(device), torch.full((1, 4), 0.7).to(device))
    hidden = torch.tensor(1.2).bfloat16().square()
    out = launched(x, up, down, ids, torch.ones(2, 1).double().to(device), None, scales)
    assert torch.equal(out.cpu(), (hidden.float() * 0.7).bfloat16().expand(2, 4))


@pytest.mark.parametrize("num_tokens", [1, 17])
def test_expert_kernels_round_where_the_pytorch_path_rounds(device: torch.device, num_tokens: int) -> None:
    # Small integers: every product is exact, and only the places of rounding matter. Sums up to 35 have squares of
    # more than bfloat16's 8 bits.
    x = (randn(num_tokens, HIDDEN).abs() < 0.5).bfloat16().to(device)
    up = (randn(EXPERTS, WIDTH, HIDDEN, seed=1).abs() < 0.5).bfloat16().to(device)
    down = (randn(EXPERTS, HIDDEN, WIDTH, seed=2) > 2).bfloat16().to(device)
    ids, weights = distinct_ids(num_tokens, 2).to(device), torch.full((num_tokens, 2), 0.5).double().to(device)
    hidden = torch.einsum("th,tkwh->tkw", x.float(), up[ids].float()).bfloat16().relu().square()
    outputs = torch.einsum("tkw,tkhw->tkh", hidden.float(), down[ids].float()).bfloat16()
    expected = (outputs.double() * weights[:, :, None]).sum(1).bfloat16()
    assert torch.equal(launched(x, up, down, ids, weights), expected)


def test_expert_kernels_take_weights_and_tokens_of_any_strides(device: torch.device) -> None:
    x = randn(17, 2 * HIDDEN).float().to(device)[:, 1::2]
    up, down = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in weights_of_experts(torch.float32, device))
    ids, weights = distinct_ids(17, 3).to(device), randn(6, 17, seed=3).sigmoid().to(device)[::2].t()
    rows = shared_expert(torch.float32, device)
    shared = SharedExpert(rows.up.t().contiguous().t(), rows.down.t().contiguous().t())
    expected = launched(x.contiguous(), up.contiguous(), down.contiguous(), ids, weights.contiguous(), rows)
    actual = launched(x, up, down, ids.t().contiguous().t(), weights, shared)
    # Another memory layout of a matrix may change the order of additions.
    torch.testing.assert_close(actual, expected, atol=FLOAT32_OP, rtol=FLOAT32_OP)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 17, 32, 33])
def test_expert_kernels_add_the_shared_expert(device: torch.device, num_tokens: int, dtype: torch.dtype) -> None:
    x, (up, down) = randn(num_tokens, HIDDEN).to(device, dtype) / 4, weights_of_experts(dtype, device)
    # Small integers: the shared expert's products are exact, and rounded where PyTorch rounds them.
    x[:, ::2] = (x[:, ::2] * 8).round()
    x[:, 1::2] = 0
    shared = shared_expert(dtype, device)
    shared = SharedExpert(shared.up.round(), (shared.down / 2).round())
    ids, weights = distinct_ids(num_tokens, 3).to(device), randn(num_tokens, 3, seed=3).sigmoid().to(device)
    routed = launched(x, up, down, ids, weights)
    assert torch.equal(launched(x, up, down, ids, weights, shared), routed + mlp(x, shared.up, shared.down))


@pytest.mark.parametrize(("num_tokens", "joins"), [(1, True), (32, True), (33, False)])
def test_the_launches_of_few_tokens_compute_the_shared_expert(
    device: torch.device, num_tokens: int, joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[Tensor] = []
    monkeypatch.setattr(kernel, "mlp", lambda x, up, down: products.append(x) or mlp(x, up, down))
    x, (up, down) = randn(num_tokens, HIDDEN).float().to(device), weights_of_experts(torch.float32, device)
    ids, weights = distinct_ids(num_tokens, 2).to(device), randn(num_tokens, 2, seed=3).sigmoid().to(device)
    shared = shared_expert(torch.float32, device)
    actual = launched(x, up, down, ids, weights, shared)
    assert len(products) == (not joins)
    expected = grouped_experts_reference(*(t.cpu().double() for t in (x, up, down)), ids, weights, widened(shared))
    assert relative_error(actual, expected) < FLOAT32_OP


def test_expert_kernels_do_not_read_experts_that_nobody_chose(device: torch.device) -> None:
    x, (up, down) = randn(17, HIDDEN).float().to(device), weights_of_experts(torch.float32, device)
    up[3:], down[3:] = torch.nan, torch.nan
    ids, weights = torch.tensor([[2, 0]] * 17).to(device), torch.full((17, 2), 0.5).double().to(device)
    assert torch.isfinite(launched(x, up, down, ids, weights)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_overflows_in_one_token_stays_there(device: torch.device, bad: float) -> None:
    x, (up, down) = randn(17, HIDDEN).float().to(device), weights_of_experts(torch.float32, device)
    ids, weights = distinct_ids(17, 3).to(device), randn(17, 3, seed=3).sigmoid().to(device)
    expected = launched(x, up, down, ids, weights)
    x[5, 7] = bad
    actual = launched(x, up, down, ids, weights)
    others = [token for token in range(17) if token != 5]
    assert torch.equal(actual[others], expected[others])
    assert not torch.isfinite(actual[5]).any()


def test_nan_passes_the_squared_relu(device: torch.device) -> None:
    x, (up, down) = torch.full((1, HIDDEN), torch.nan).float().to(device), weights_of_experts(torch.float32, device)
    ids, weights = torch.tensor([[2, 0]]).to(device), torch.full((1, 2), 0.5).double().to(device)
    assert launched(x, up, down, ids, weights).isnan().all()


def test_sum_over_experts_runs_in_the_dtype_of_their_weights(device: torch.device) -> None:
    # In float32 the small one would vanish beside the two that cancel.
    up, down = torch.ones(3, 1, 1), torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1)
    x, ids = torch.ones(2, 1), torch.tensor([[0, 1, 2]] * 2)
    weights = torch.tensor([[2.0**40, 2.0**40 - 1, 2.0**-3]] * 2, dtype=torch.float64)
    arguments = [t.to(device) for t in (x, up, down, ids, weights)]
    assert launched(*arguments).tolist() == [[1.125], [1.125]]


def test_expert_kernels_write_every_element_and_leave_their_inputs_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, (up, down) = randn(19, HIDDEN).float().to(device), weights_of_experts(torch.float32, device)
    ids, weights = distinct_ids(19, 3).to(device), randn(19, 3, seed=3).sigmoid().to(device)
    inputs = [x, up, down, ids, weights]
    before = [t.clone() for t in inputs]
    expected = launched(*inputs)

    def poisoned(self: Tensor, size: Any, **options: Any) -> Tensor:
        made = self.new_zeros(size, **options)
        return made.fill_(torch.nan if made.is_floating_point() else -7)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    assert torch.equal(launched(*inputs), expected)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_no_tokens_give_no_outputs(device: torch.device) -> None:
    up, down = weights_of_experts(torch.float32, device)
    ids, weights = torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3).double()
    out = launched(torch.empty(0, HIDDEN).to(device), up, down, ids.to(device), weights.to(device))
    assert out.shape == (0, HIDDEN)


@pytest.mark.parametrize(
    ("num_tokens", "kind"),
    [(1, "one"), (2, "few"), (16, "few"), (170, "few"), (171, "some"), (1024, "some"), (8192, "many")],
)
def test_every_number_of_tokens_has_its_product(num_tokens: int, kind: str) -> None:
    for is_quantised, name in ((False, "product"), (True, "quantised")):
        kind_of = partial(kernel.kind_of_product, num_tokens, 6, 128, is_quantised=is_quantised)
        assert kind_of(torch.bfloat16) == f"{name}_{kind}"
        assert kind_of(torch.float32) == "product_float32"


def test_settings_of_every_kernel_are_among_its_candidates() -> None:
    assert tuning.read_table("experts")["kernels"].keys() == variants.CANDIDATES.keys()
    for name, candidates in variants.CANDIDATES.items():
        assert tuning.settings("experts", name) in candidates


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": (EXPERTS, WIDTH, HIDDEN + 1)}, "do not fit"),
        ({"down": (EXPERTS, WIDTH, HIDDEN)}, "do not fit"),
        ({"weights": (5, 2)}, "one row for each of 5 tokens"),
        ({"shared_up": (SHARED_WIDTH, HIDDEN + 1)}, "the shared expert has up"),
        ({"shared_down": (SHARED_WIDTH, HIDDEN)}, "the shared expert has up"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(
    changes: dict[str, tuple[int, ...]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower_kernels.experts.op.use_triton", lambda *tensors: True)
    shapes = {
        "x": (5, HIDDEN),
        "up": (EXPERTS, WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
        "ids": (5, 3),
        "weights": (5, 3),
        "shared_up": (SHARED_WIDTH, HIDDEN),
        "shared_down": (HIDDEN, SHARED_WIDTH),
    }
    x, up, down, ids, weights, *shared = (torch.zeros(shape) for shape in (shapes | changes).values())
    with pytest.raises(ValueError, match=message):
        grouped_experts(x, up, down, ids.long(), weights, SharedExpert(*shared))


def test_a_shared_expert_of_another_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower_kernels.experts.op.use_triton", lambda *tensors: True)
    up, down = weights_of_experts(torch.float32, torch.device("cpu"))
    shared = shared_expert(torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"is torch.bfloat16 and torch.bfloat16; give torch.float32, as x is"):
        grouped_experts(torch.zeros(5, HIDDEN), up, down, distinct_ids(5, 3), torch.zeros(5, 3), shared)


@pytest.mark.parametrize(
    ("up_dtype", "down_dtype", "scale_dtype", "num_scales", "message"),
    [
        (torch.int8, torch.float8_e4m3fn, torch.float32, WIDTH, "give both in torch.float8_e4m3fn or torch.int8"),
        (torch.float32, torch.float32, torch.float32, WIDTH, "give both in torch.float8_e4m3fn or torch.int8"),
        (torch.int8, torch.int8, torch.float64, WIDTH, "scales of up are torch.float64"),
        (torch.int8, torch.int8, torch.float32, WIDTH + 1, "give torch.float32 .6, 21."),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    up_dtype: torch.dtype,
    down_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    num_scales: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("twotower_kernels.experts.op.use_triton", lambda *tensors: True)
    up, down = torch.zeros(EXPERTS, WIDTH, HIDDEN).to(up_dtype), torch.zeros(EXPERTS, HIDDEN, WIDTH).to(down_dtype)
    scales = ExpertScales(torch.ones(EXPERTS, num_scales, dtype=scale_dtype), torch.ones(EXPERTS, HIDDEN))
    with pytest.raises(ValueError, match=message):
        grouped_experts(torch.zeros(5, HIDDEN), up, down, distinct_ids(5, 3), torch.zeros(5, 3), None, scales)


@pytest.mark.parametrize(
    ("top_k", "num_groups", "top_groups", "message"),
    [
        (7, 1, 1, "top_k 7"),
        (0, 1, 1, "top_k 0"),
        (2, 4, 1, "4 groups"),
        (2, 6, 1, "6 groups"),
        (2, 2, 3, "top_groups 3"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(
    top_k: int, num_groups: int, top_groups: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower_kernels.experts.op.use_triton", lambda *tensors: True)
    with pytest.raises(ValueError, match=message):
        route(torch.rand(3, 6), torch.zeros(6), ExpertChoice(top_k, num_groups, top_groups, True, 1.0))


def test_public_functions_take_the_kernels_where_they_run(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    x, (up, down) = randn(5, HIDDEN).float().to(device), weights_of_experts(torch.float32, device)
    router, bias = randn(EXPERTS, HIDDEN, seed=6).float().to(device), torch.zeros(EXPERTS).to(device)
    choice = ExpertChoice(3, 1, 1, True, 2.5)
    monkeypatch.setattr("twotower_kernels.experts.op.use_triton", lambda *tensors: False)
    plain_choice = route_tokens(x, router, bias, choice)
    shared = shared_expert(torch.float32, device)
    plain = grouped_experts(x, up, down, *plain_choice, shared)
    monkeypatch.setattr("twotower_kernels.experts.op.use_triton", lambda *tensors: True)
    assert_same_choice(route_tokens(x, router, bias, choice), by_id(plain_choice), FLOAT64)
    assert relative_error(grouped_experts(x, up, down, *plain_choice, shared), plain) < FLOAT32_OP
