"""Norms, modulation and gates: the PyTorch path against definitions, the kernels against the PyTorch path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tolerances import BFLOAT16_RELATIVE, FLOAT32_OP, FLOAT64
from twotower_kernels.experts import ExpertOutputs
from twotower_kernels.time_modulation import (
    add_then_norm,
    gated_group_norm,
    modulate_then_norm,
    norm_then_modulate,
    op,
    rms_norm,
)
from twotower_kernels.time_modulation.reference import (
    gated_group_norm_reference,
    modulate_reference,
    rms_norm_reference,
)
from twotower_kernels.tuning import read_table

EPS = 1e-5
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
# Dtypes of a model and of its residual stream.
MODELS = [(BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32), (FLOAT32, FLOAT32)]
# Requests and tokens of each.
BATCHES = [(1, 1), (3, 1), (1, 3), (2, 17)]
ORDERS = [modulate_then_norm, norm_then_modulate]
NORMS = [rms_norm, *ORDERS]

Op = Callable[..., Any]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def modulation_of(num_reqs: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, scale and gate of layer 1 of 4, as the denoiser slices them."""
    shift, scale, gate = randn(num_reqs, 4, 3, hidden, seed=1).to(dtype)[:, 1].unbind(1)
    return shift, scale, gate


def norm_case(
    num_reqs: int, num_tokens: int, hidden: int, model: torch.dtype, stream: torch.dtype, rows: int | None = None
) -> tuple[Any, ...]:
    """Arguments of the norms with modulation."""
    shift, scale, _ = modulation_of(rows or num_reqs, hidden, model)
    return randn(num_reqs, num_tokens, hidden).to(stream), shift, scale, randn(hidden, seed=2).to(model), EPS, model


def branch_case(
    num_reqs: int, num_tokens: int, hidden: int, model: torch.dtype, stream: torch.dtype, order: Op, gated: bool = True
) -> tuple[Any, ...]:
    """Arguments of `add_then_norm`."""
    residual, *rest = norm_case(num_reqs, num_tokens, hidden, model, stream)
    branch = randn(num_reqs, num_tokens, hidden, seed=3).to(model)
    gate = modulation_of(num_reqs, hidden, model)[2] if gated else None
    return order, residual, branch, gate, *(rest[2:] if order is rms_norm else rest)


def expert_case(
    num_reqs: int,
    num_tokens: int,
    hidden: int,
    model: torch.dtype,
    stream: torch.dtype,
    order: Op,
    gated: bool = True,
    has_shared: bool = True,
) -> tuple[Any, ...]:
    """Arguments of `add_then_norm` after a layer of experts, of which 3 are summed for a token."""
    order, residual, _, gate, *rest = branch_case(num_reqs, num_tokens, hidden, model, stream, order, gated)
    rows = num_reqs * num_tokens
    chosen, weights = randn(rows, 3, hidden, seed=3).to(model), randn(rows, 3, seed=4).sigmoid()
    shared = randn(rows, hidden, seed=5).to(model) if has_shared else None
    return order, residual, ExpertOutputs(chosen, weights, shared), gate, *rest


def group_case(num_reqs: int, num_tokens: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the gated norm of 3 groups; the gate is a part of a wider projection."""
    channels = 3 * width
    gate, _ = randn(num_reqs, num_tokens, channels + 5, seed=1).to(dtype).split([channels, 5], dim=-1)
    scanned = randn(num_reqs, num_tokens, channels).to(torch.float64 if dtype == torch.float64 else FLOAT32)
    return scanned, gate, randn(channels, seed=2).to(dtype), 3, EPS


@pytest.fixture
def in_triton(device: torch.device) -> Op:
    """Calls an op and makes it take its kernels, on any device."""

    def run(function: Op, *arguments: Any) -> Any:
        moved = [moved_to(device, a) for a in arguments]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "use_triton", lambda *tensors: True)
            out = function(*moved)
        return tuple(one.cpu() for one in out) if isinstance(out, tuple) else out.cpu()

    return run


def moved_to(device: torch.device, argument: Any) -> Any:
    if isinstance(argument, ExpertOutputs):
        return ExpertOutputs(*(moved_to(device, x) for x in vars(argument).values()))
    return on_device(argument, device) if isinstance(argument, Tensor) else argument


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device with its strides, which a plain `to` would change."""
    storage = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to a few units of float32; where these decide the rounding to bfloat16, a few results may be neighbours."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert actual.is_contiguous()
    if expected.dtype == FLOAT32:
        torch.testing.assert_close(actual, expected, atol=FLOAT32_OP, rtol=FLOAT32_OP)
    else:
        assert (actual != expected).double().mean() < 0.01
        assert ((actual - expected).double().norm() / expected.double().norm()).item() < BFLOAT16_RELATIVE


def test_rms_norm_equals_its_definition() -> None:
    x, weight = randn(3, 11), randn(11, seed=1)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5, torch.float64), rms_norm_reference(x, weight, 1e-5), atol=FLOAT64, rtol=FLOAT64
    )


def test_modulation_stands_on_the_side_of_the_norm_its_name_says() -> None:
    x, weight = randn(2, 3, 11), randn(11, seed=1)
    shift, scale = randn(2, 11, seed=2), randn(2, 11, seed=3)
    before = rms_norm_reference(modulate_reference(x, shift, scale), weight, 1e-5)
    after = modulate_reference(rms_norm_reference(x, weight, 1e-5), shift, scale)
    options = (shift, scale, weight, 1e-5, torch.float64)
    torch.testing.assert_close(modulate_then_norm(x, *options), before, atol=FLOAT64, rtol=FLOAT64)
    torch.testing.assert_close(norm_then_modulate(x, *options), after, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize(("num_reqs", "num_tokens"), BATCHES)
def test_gated_group_norm_equals_its_definition(num_reqs: int, num_tokens: int) -> None:
    case = group_case(num_reqs, num_tokens, 7, torch.float64)
    torch.testing.assert_close(gated_group_norm(*case), gated_group_norm_reference(*case), atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_gated_group_norm_in_narrow_dtypes_rounds_where_its_definition_does(dtype: torch.dtype) -> None:
    case = group_case(3, 17, 7, dtype)
    expected = gated_group_norm_reference(*case)
    assert_same(gated_group_norm(*case), expected)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (17, 1), (2, 1, 3)])
@pytest.mark.parametrize("hidden", [1, 37, 64])
def test_norm_kernel_equals_the_pytorch_path(
    hidden: int, shape: tuple[int, ...], dtype: torch.dtype, in_triton: Op
) -> None:
    x, weight = randn(*shape, hidden).to(dtype), randn(hidden, seed=1).to(dtype)
    assert_same(in_triton(rms_norm, x, weight, EPS, x.dtype), rms_norm(x, weight, EPS, x.dtype))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_norm_kernel_takes_a_stream_wider_than_the_weights(dtype: torch.dtype, in_triton: Op) -> None:
    x, weight = randn(17, 37).float(), randn(37, seed=1).bfloat16()
    assert_same(in_triton(rms_norm, x, weight, EPS, dtype), rms_norm(x, weight, EPS, dtype))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("model", "stream"), MODELS)
@pytest.mark.parametrize(("num_reqs", "num_tokens"), BATCHES)
@pytest.mark.parametrize("hidden", [37, 2688])
def test_modulation_kernel_equals_the_pytorch_path(
    hidden: int,
    num_reqs: int,
    num_tokens: int,
    model: torch.dtype,
    stream: torch.dtype,
    order: Op,
    in_triton: Op,
) -> None:
    case = norm_case(num_reqs, num_tokens, hidden, model, stream)
    assert_same(in_triton(order, *case), order(*case))


@pytest.mark.parametrize("order", NORMS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("model", "stream"), MODELS)
@pytest.mark.parametrize(("num_reqs", "num_tokens"), BATCHES)
def test_sum_before_a_norm_is_the_pytorch_path_bit_for_bit(
    num_reqs: int, num_tokens: int, model: torch.dtype, stream: torch.dtype, gated: bool, order: Op, in_triton: Op
) -> None:
    case = branch_case(num_reqs, num_tokens, 37, model, stream, order, gated)
    (total, normed), (expected, expected_norm) = in_triton(add_then_norm, *case), add_then_norm(*case)
    assert torch.equal(total, expected) and total.dtype == expected.dtype
    assert_same(normed, expected_norm)


@pytest.mark.parametrize("order", NORMS)
@pytest.mark.parametrize(("model", "stream"), MODELS)
@pytest.mark.parametrize("hidden", [1, 37, 2688])
def test_norm_of_a_sum_is_that_of_the_sum_written_and_read_again(
    hidden: int, model: torch.dtype, stream: torch.dtype, order: Op, in_triton: Op
) -> None:
    case = branch_case(2, 3, hidden, model, stream, order)
    total, normed = in_triton(add_then_norm, *case)
    assert torch.equal(normed, in_triton(order, total, *case[4:]))


@pytest.mark.parametrize("order", NORMS)
@pytest.mark.parametrize(("gated", "has_shared"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("model", "stream"), MODELS)
@pytest.mark.parametrize(("num_reqs", "num_tokens"), [(1, 1), (2, 17)])
def test_outputs_of_experts_are_summed_before_a_norm_as_by_themselves(
    num_reqs: int,
    num_tokens: int,
    model: torch.dtype,
    stream: torch.dtype,
    has_shared: bool,
    gated: bool,
    order: Op,
    in_triton: Op,
) -> None:
    order, residual, outputs, *rest = expert_case(num_reqs, num_tokens, 37, model, stream, order, gated, has_shared)
    total, normed = in_triton(add_then_norm, order, residual, outputs, *rest)
    branch = outputs.total().view(residual.shape)
    expected, expected_norm = in_triton(add_then_norm, order, residual, branch, *rest)
    assert torch.equal(total, expected) and torch.equal(normed, expected_norm)
    plain, plain_norm = add_then_norm(order, residual, outputs, *rest)
    assert torch.equal(total, plain)
    assert_same(normed, plain_norm)


def test_experts_are_weighed_and_summed_as_written_out(in_triton: Op) -> None:
    # In float32 the small one would vanish beside the two that cancel; a shared one is added once the sum is rounded.
    chosen = torch.tensor([1.0, -1.0, 1.0]).bfloat16().expand(2, 5, 3).transpose(1, 2).contiguous()
    weights = torch.tensor([[2.0**40, 2.0**40 - 1, 2.0**-3]] * 2, dtype=torch.float64)
    outputs = ExpertOutputs(chosen, weights, torch.full((2, 5), 2.0**-8).bfloat16())
    residual, weight = torch.zeros(1, 2, 5).bfloat16(), torch.ones(5).bfloat16()
    expected = torch.full((1, 2, 5), 1.125 + 2.0**-8).bfloat16()
    for total, _ in (
        in_triton(add_then_norm, rms_norm, residual, outputs, None, weight, EPS, BFLOAT16),
        add_then_norm(rms_norm, residual, outputs, None, weight, EPS, BFLOAT16),
    ):
        assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize(("num_reqs", "num_tokens"), BATCHES)
@pytest.mark.parametrize("width", [1, 11, 512])
def test_group_norm_kernel_equals_the_pytorch_path(
    width: int, num_reqs: int, num_tokens: int, dtype: torch.dtype, in_triton: Op
) -> None:
    case = group_case(num_reqs, num_tokens, width, dtype)
    assert_same(in_triton(gated_group_norm, *case), gated_group_norm(*case))


@pytest.mark.parametrize("order", ORDERS)
def test_one_modulation_row_serves_every_request(order: Op, in_triton: Op) -> None:
    x, shift, scale, *rest = norm_case(3, 5, 37, BFLOAT16, BFLOAT16, rows=1)
    repeated = in_triton(order, x, shift.repeat(3, 1), scale.repeat(3, 1), *rest)
    assert torch.equal(in_triton(order, x, shift, scale, *rest), repeated)


def test_one_gate_row_serves_every_request(in_triton: Op) -> None:
    order, residual, branch, gates, *rest = branch_case(3, 5, 37, BFLOAT16, BFLOAT16, rms_norm)
    shared = in_triton(add_then_norm, order, residual, branch, gates[:1], *rest)
    repeated = in_triton(add_then_norm, order, residual, branch, gates[:1].repeat(3, 1), *rest)
    assert all(torch.equal(*pair) for pair in zip(shared, repeated, strict=True))


def rows_of_a_wider_tensor(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]


def total_of(*case: Any) -> Tensor:
    return add_then_norm(*case)[0]


def normed_of(*case: Any) -> Tensor:
    return add_then_norm(*case)[1]


def tokens_before_requests(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def channels_apart(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("view", [rows_of_a_wider_tensor, tokens_before_requests, channels_apart])
def test_kernels_take_views_of_any_strides(view: Callable[[Tensor], Tensor], in_triton: Op) -> None:
    x, shift, scale, weight, *rest = norm_case(3, 5, 37, BFLOAT16, BFLOAT16)
    _, residual, branch, gate, *_ = branch_case(3, 5, 37, BFLOAT16, BFLOAT16, rms_norm)
    scanned, z, group_weight, *group_rest = group_case(3, 5, 11, BFLOAT16)
    for function, plain, viewed in (
        (rms_norm, (x, weight, *rest), (view(x), weight, *rest)),
        *(
            (order, (x, shift, scale, weight, *rest), (view(x), channels_apart(shift), scale, weight, *rest))
            for order in ORDERS
        ),
        *(
            (
                part,
                (rms_norm, residual, branch, gate, weight, *rest),
                (rms_norm, view(residual), view(branch), channels_apart(gate), weight, *rest),
            )
            for part in (total_of, normed_of)
        ),
        (
            gated_group_norm,
            (scanned, z, group_weight, *group_rest),
            (view(scanned), view(z), group_weight, *group_rest),
        ),
    ):
        assert torch.equal(in_triton(function, *viewed), in_triton(function, *plain))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_extreme_values_stay_in_their_row_and_do_there_as_in_pytorch(value: float, in_triton: Op) -> None:
    x, shift, scale, weight, *rest = norm_case(3, 2, 37, BFLOAT16, BFLOAT16)
    order, residual, branch, gate, *norm_rest = branch_case(3, 2, 37, BFLOAT16, BFLOAT16, modulate_then_norm)
    scanned, z, group_weight, *group_rest = group_case(3, 2, 11, BFLOAT16)
    for poisoned, function, case in (
        (x, rms_norm, (x, weight, *rest)),
        *((x, order, (x, shift, scale, weight, *rest)) for order in ORDERS),
        (branch, total_of, (order, residual, branch, gate, *norm_rest)),
        (branch, normed_of, (order, residual, branch, gate, *norm_rest)),
        (scanned, gated_group_norm, (scanned, z, group_weight, *group_rest)),
        (z, gated_group_norm, (scanned, z, group_weight, *group_rest)),
    ):
        healthy = in_triton(function, *case)
        before = poisoned[1, 1, 5].clone()
        poisoned[1, 1, 5] = value
        actual, expected = in_triton(function, *case), function(*case)
        poisoned[1, 1, 5] = before
        torch.testing.assert_close(actual[1, 1], expected[1, 1], equal_nan=True)
        actual[1, 1] = healthy[1, 1]
        assert torch.equal(actual, healthy)


def test_norm_kernel_of_zeros_is_zero(in_triton: Op) -> None:
    assert torch.equal(in_triton(rms_norm, torch.zeros(2, 5), torch.ones(5), EPS, FLOAT32), torch.zeros(2, 5))


def test_kernels_write_their_output_and_nothing_around_it(in_triton: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    margin, buffers = 4096, []

    def poisoned(x: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        assert memory_format == torch.contiguous_format
        buffers.append(torch.full((x.numel() + 2 * margin,), torch.nan, dtype=dtype, device=x.device))
        return buffers[-1][margin:-margin].view(x.shape)

    calls = [
        (rms_norm, (randn(3, 37).float(), randn(37, seed=1).float(), EPS, FLOAT32)),
        *((order, norm_case(3, 5, 37, BFLOAT16, BFLOAT16)) for order in ORDERS),
        *((add_then_norm, case(3, 5, 37, BFLOAT16, BFLOAT16, o)) for o in NORMS for case in (branch_case, expert_case)),
        (gated_group_norm, group_case(3, 5, 11, BFLOAT16)),
    ]
    for function, case in calls:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", poisoned)
            out = in_triton(function, *case)
        for one in out if isinstance(out, tuple) else (out,):
            assert torch.isfinite(one).all()
    for buffer in buffers:
        assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all()
    assert len(buffers) == len(calls) + 2 * len(NORMS)


def test_no_rows_give_no_rows(in_triton: Op) -> None:
    assert in_triton(rms_norm, torch.empty(0, 37), torch.ones(37), EPS, FLOAT32).shape == (0, 37)
    for order in ORDERS:
        assert in_triton(order, *norm_case(0, 1, 37, BFLOAT16, FLOAT32, rows=1)).shape == (0, 1, 37)
    for case in (branch_case, expert_case):
        for one in in_triton(add_then_norm, *case(0, 1, 37, BFLOAT16, BFLOAT16, rms_norm, gated=False)):
            assert one.shape == (0, 1, 37)
    assert in_triton(gated_group_norm, *group_case(0, 1, 11, BFLOAT16)).shape == (0, 1, 33)


def test_float64_stays_with_pytorch(in_triton: Op) -> None:
    x, weight = randn(3, 11), randn(11, seed=1)
    expected = rms_norm_reference(x, weight, EPS)
    torch.testing.assert_close(in_triton(rms_norm, x, weight, EPS, torch.float64), expected, atol=FLOAT64, rtol=FLOAT64)


def test_inputs_that_do_not_fit_are_refused() -> None:
    x, rows, weight = torch.zeros(2, 3, 6), torch.zeros(2, 6), torch.ones(6)
    with pytest.raises(ValueError, match=r"weight is \(5,\)"):
        rms_norm(x, weight[:5], EPS, FLOAT32)
    for order in ORDERS:
        with pytest.raises(ValueError, match=r"shift is \(3, 6\)"):
            order(x, torch.zeros(3, 6), torch.zeros(3, 6), weight, EPS, FLOAT32)
        with pytest.raises(ValueError, match="scale_plus_one"):
            order(x, rows, rows.bfloat16(), weight, EPS, FLOAT32)
    with pytest.raises(ValueError, match=r"residual is \(1, 3, 6\)"):
        add_then_norm(rms_norm, x[:1], x, rows, weight, EPS, FLOAT32)
    for chosen in (torch.zeros(5, 2, 6), torch.zeros(6, 2, 5)):
        outputs = ExpertOutputs(chosen, torch.zeros(chosen.shape[:2]), None)
        with pytest.raises(ValueError, match="give them one number of tokens"):
            add_then_norm(rms_norm, x, outputs, None, weight, EPS, FLOAT32)
    with pytest.raises(ValueError, match=r"gate is \(2, 5\)"):
        add_then_norm(rms_norm, x, x, rows[:, :5], weight, EPS, FLOAT32)
    with pytest.raises(ValueError, match="scanned"):
        gated_group_norm(x[:1], x, weight, 2, EPS)
    with pytest.raises(ValueError, match="num_groups 4"):
        gated_group_norm(x, x, weight, 4, EPS)


def test_settings_in_use_are_among_those_the_tuner_may_choose() -> None:
    pytest.importorskip("triton")
    from twotower_kernels.time_modulation.variants import CANDIDATES

    table = read_table("time_modulation")["kernels"]
    assert table.keys() == CANDIDATES.keys()
    assert all(chosen in CANDIDATES[name] for name, chosen in table.items())
