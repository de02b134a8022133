"""The Triton kernel of the scan against the recurrence, one token after the other."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.tolerances import BFLOAT16_RELATIVE, FLOAT32_OP
from twotower_kernels.block_scan import ScanWeights, block_scan, pool_scan, replay_scan
from twotower_kernels.block_scan import kernel as scan_room
from twotower_kernels.block_scan.reference import block_scan_reference
from twotower_kernels.block_scan.variants import CANDIDATES
from twotower_kernels.tuning import read_table, trying

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, ScanWeights]


@pytest.fixture(autouse=True)
def _kernel_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower_kernels.block_scan.op.use_triton", lambda *tensors: True)


def inputs(
    device: torch.device,
    num_reqs: int,
    num_tokens: int,
    taps: int = 4,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int, int, int] = (4, 5, 2, 7),
) -> Inputs:
    """Makes inputs as the towers pass them: u and delta are parts of one projection, states of a pool of slots.

    Args:
        sizes: heads, head_dim, groups, state_size.
    """
    heads, head_dim, groups, state_size = sizes
    d_inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state_size
    generator = torch.Generator().manual_seed(num_tokens * 7 + taps)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    projection = randn(num_reqs, num_tokens, d_inner + channels + heads).to(dtype)
    _, u, delta = projection.split([d_inner, channels, heads], dim=-1)
    conv_pool = randn(2, num_reqs + 3, taps - 1, channels).to(dtype)
    ssm_pool = randn(2, num_reqs + 3, heads, head_dim, state_size)
    weights = ScanWeights(
        conv_weight=randn(taps, channels).to(dtype).t(),
        conv_bias=randn(channels).to(dtype) if bias else None,
        a_log=randn(heads),
        d=randn(heads),
        dt_bias=randn(heads),
        num_groups=groups,
    )
    return u, delta, conv_pool[1, 2:-1], ssm_pool[1, 2:-1], weights


def assert_close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, atol=FLOAT32_OP, rtol=FLOAT32_OP)


def assert_same_scan(
    actual: tuple[Tensor, Tensor | None, Tensor | None], expected: tuple[Tensor, Tensor, Tensor], lens: Sequence[int]
) -> None:
    for row, length in enumerate(lens):
        assert_close(actual[0][row, :length], expected[0][row, :length])
        assert not actual[0][row, length:].any()
    assert actual[1] is not None and torch.equal(actual[1], expected[1])
    assert_close(actual[2], expected[2])


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 15, 17, 33, 64, 65, 130])
def test_kernel_scans_any_length_as_the_recurrence_does(num_tokens: int, device: torch.device) -> None:
    case = inputs(device, 2, num_tokens)
    assert_same_scan(block_scan(*case), block_scan_reference(*case), [num_tokens] * 2)


@pytest.mark.parametrize("sizes", [(2, 35, 1, 37), (3, 1, 3, 1), (6, 32, 2, 32), (1, 16, 1, 65)])
def test_sizes_need_not_fit_the_tiles(sizes: tuple[int, int, int, int], device: torch.device) -> None:
    case = inputs(device, 1, 5, sizes=sizes)
    assert_same_scan(block_scan(*case), block_scan_reference(*case), [5])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 3, 5])
def test_kernel_takes_any_number_of_taps(taps: int, bias: bool, device: torch.device) -> None:
    case = inputs(device, 1, 6, taps, bias)
    assert_same_scan(block_scan(*case), block_scan_reference(*case), [6])


@pytest.mark.parametrize("lens", [[5, 0, 17], [1, 2, 3], [64, 65, 130], [0, 0, 1]])
def test_rows_of_unequal_length_end_where_their_tokens_end(lens: list[int], device: torch.device) -> None:
    case, query_lens = inputs(device, 3, max(lens)), torch.tensor(lens, device=device)
    assert_same_scan(block_scan(*case, query_lens), block_scan_reference(*case, query_lens), lens)


@pytest.mark.parametrize("num_tokens", [1, 6, 66])
def test_kernel_replays_any_number_of_accepted_tokens(num_tokens: int, device: torch.device) -> None:
    lens = torch.tensor(sorted({0, 1, num_tokens // 2, num_tokens}), device=device)
    case = inputs(device, len(lens), num_tokens)
    conv, ssm = replay_scan(*case, lens)
    _, expected_conv, expected_ssm = block_scan_reference(*case, lens)
    assert torch.equal(conv, expected_conv)
    assert_close(ssm, expected_ssm)


def test_kernel_leaves_its_inputs_alone_and_gives_the_same_output_without_states(device: torch.device) -> None:
    case = inputs(device, 2, 17)
    before = [t.clone() for t in case[:4]]
    with_states, _, _ = block_scan(*case)
    y, conv, ssm = block_scan(*case, return_state=False)
    assert conv is None and ssm is None
    assert torch.equal(y, with_states)
    assert all(torch.equal(a, b) for a, b in zip(before, case[:4], strict=True))


@pytest.mark.parametrize("lens", [None, [5, 0, 17], [33, 40, 1]])
@pytest.mark.parametrize("slots", [[4, 0, 3], slice(1, 4)])
def test_states_of_a_pool_are_read_and_written_where_they_lie(
    slots: list[int] | slice, lens: list[int] | None, device: torch.device
) -> None:
    u, delta, conv, ssm, weights = inputs(device, 3, 17 if lens is None else max(lens))
    generator = torch.Generator().manual_seed(1)
    conv_pool = torch.randn(6, *conv.shape[1:], generator=generator).to(device)
    ssm_pool = torch.randn(6, *ssm.shape[1:], generator=generator).to(device)
    before = conv_pool.clone(), ssm_pool.clone()
    query_lens = None if lens is None else torch.tensor(lens, device=device)
    rows = slots if isinstance(slots, slice) else torch.tensor(slots, device=device)
    expected = block_scan_reference(u, delta, conv_pool[rows], ssm_pool[rows], weights, query_lens)
    new_conv = torch.full_like(conv, torch.nan)
    for kept in (None, new_conv):
        assert torch.equal(conv_pool, before[0]) and torch.equal(ssm_pool, before[1])
        y = pool_scan(u, delta, conv_pool, ssm_pool, rows, weights, query_lens, kept)
        assert_same_scan((y, *expected[1:]), expected, [u.shape[1]] * 3 if lens is None else lens)
    assert torch.equal(new_conv, expected[1])
    assert_close(ssm_pool[rows], expected[2])
    others = [slot for slot in range(6) if slot not in ([1, 2, 3] if isinstance(slots, slice) else slots)]
    assert torch.equal(conv_pool[others], before[0][others]) and torch.equal(ssm_pool[others], before[1][others])


@pytest.mark.parametrize("num_tokens", [1, 17])
def test_kernel_rounds_bfloat16_where_the_recurrence_does(num_tokens: int, device: torch.device) -> None:
    case = inputs(device, 2, num_tokens, dtype=torch.bfloat16)
    y, conv, ssm = block_scan(*case)
    expected = block_scan_reference(*case)
    assert conv is not None and ssm is not None
    assert y.dtype == ssm.dtype == torch.float32
    assert torch.equal(conv, expected[1])
    for actual, wanted in ((y, expected[0]), (ssm, expected[2])):
        assert (actual - wanted).norm() < BFLOAT16_RELATIVE * wanted.norm()


def test_views_and_copies_of_them_are_scanned_alike(device: torch.device) -> None:
    u, delta, conv, ssm, weights = inputs(device, 2, 9)
    assert not u.is_contiguous() and not delta.is_contiguous()
    copied = replace(weights, conv_weight=weights.conv_weight.contiguous())
    other_order = (
        u.transpose(1, 2).contiguous().transpose(1, 2),
        delta.transpose(1, 2).contiguous().transpose(1, 2),
        conv.transpose(1, 2).contiguous().transpose(1, 2),
        ssm.transpose(2, 3).contiguous().transpose(2, 3),
    )
    for one, other in zip(block_scan(u, delta, conv, ssm, weights), block_scan(*other_order, copied), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_poisoned_request_stays_alone(poison: float, device: torch.device) -> None:
    u, delta, conv, ssm, weights = inputs(device, 3, 18)
    lens = torch.tensor([18, 18, 4], device=device)
    expected = block_scan(u, delta, conv, ssm, weights, lens)
    for t in (u, delta, conv, ssm):
        t[1] = poison
    actual = block_scan(u, delta, conv, ssm, weights, lens)
    for one, other in zip(actual, expected, strict=True):
        assert one is not None and other is not None
        assert torch.equal(one[[0, 2]], other[[0, 2]])


def test_kernel_never_reads_padding(device: torch.device) -> None:
    u, delta, conv, ssm, weights = inputs(device, 3, 19)
    lens = torch.tensor([3, 0, 18], device=device)
    expected = block_scan(u, delta, conv, ssm, weights, lens)
    for row, length in enumerate(lens.tolist()):
        u[row, length:], delta[row, length:] = torch.nan, torch.inf
    actual = block_scan(u, delta, conv, ssm, weights, lens)
    for one, other in zip(actual, expected, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_every_element_of_the_buffers_is_written(device: torch.device) -> None:
    u, delta, conv, ssm, weights = inputs(device, 2, 5)
    y = torch.full((2, 5, ssm.shape[1] * ssm.shape[2]), torch.nan, device=device)
    new_conv, new_ssm = torch.full_like(conv, torch.nan).contiguous(), torch.full_like(ssm, torch.nan).contiguous()
    lens = torch.tensor([5, 2], device=device)
    scan_room._launch(u, delta, conv, ssm, weights, lens, None, y, new_conv, new_ssm, first_token=0)
    assert all(torch.isfinite(t).all() for t in (y, new_conv, new_ssm))


@pytest.mark.parametrize("shift", [-100.0, -12.0, 20.0, 500.0])
def test_extreme_time_steps_equal_the_recurrence(shift: float, device: torch.device) -> None:
    u, delta, conv, ssm, weights = inputs(device, 1, 20)
    case = (u, delta + shift, conv, ssm, weights)
    y, _, state = block_scan(*case)
    expected = block_scan_reference(*case)
    assert state is not None
    for actual, wanted in ((y, expected[0]), (state, expected[2])):
        assert (actual - wanted).abs().max() < FLOAT32_OP * max(1.0, wanted.abs().max().item())


def test_kernel_keeps_the_precision_of_small_decays_after_huge_ones(device: torch.device) -> None:
    u, delta, conv, ssm, weights = inputs(device, 1, 64)
    delta[:, :40], delta[:, 40:] = 300.0, -5.0
    wide = replace(
        weights,
        conv_weight=weights.conv_weight.double(),
        conv_bias=None if weights.conv_bias is None else weights.conv_bias.double(),
    )
    expected = block_scan_reference(u.double(), delta.double(), conv.double(), ssm.double(), wide)
    y, _, state = block_scan(u, delta, conv, ssm, weights)
    assert state is not None
    for actual, wanted in ((y[:, 40:], expected[0][:, 40:]), (state, expected[2])):
        assert (actual - wanted).abs().max() < FLOAT32_OP * wanted.abs().max()


@pytest.mark.parametrize("block_p", [16, 64])
@pytest.mark.parametrize("block_n", [16, 64])
def test_result_does_not_depend_on_the_tiles(block_p: int, block_n: int, device: torch.device) -> None:
    case = inputs(device, 1, 7, sizes=(2, 35, 1, 37))
    candidate = {"BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
    with trying("block_scan", "scan_16", candidate):
        assert_same_scan(block_scan(*case), block_scan_reference(*case), [7])


def test_settings_of_the_table_are_among_the_candidates() -> None:
    for name, chosen in read_table("block_scan")["kernels"].items():
        assert chosen in CANDIDATES[name]


def test_float64_models_are_left_to_pytorch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_room, "launch_scan", lambda *args, **kwargs: pytest.fail("the kernel is float32"))
    u, delta, conv, ssm, weights = inputs(device, 1, 3)
    wide = ScanWeights(
        conv_weight=weights.conv_weight.double(),
        conv_bias=None,
        a_log=weights.a_log.double(),
        d=weights.d.double(),
        dt_bias=weights.dt_bias.double(),
        num_groups=weights.num_groups,
    )
    y, _, _ = block_scan(u.double(), delta.double(), conv.double(), ssm.double(), wide)
    assert y.dtype == torch.float64
