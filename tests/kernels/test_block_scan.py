"""The chunked scan against the recurrence, one token after the other."""

import pytest
import torch
from torch import Tensor

from tests.support.tolerances import FLOAT32_OP, FLOAT64
from twotower_kernels.block_scan import ScanWeights, block_scan, replay_scan, sequence_scan
from twotower_kernels.block_scan.reference import block_scan_reference

HEADS, HEAD_DIM, GROUPS, STATE = 6, 3, 2, 5
CHANNELS = HEADS * HEAD_DIM + 2 * GROUPS * STATE


def inputs(
    num_reqs: int, num_tokens: int, taps: int = 4, dtype: torch.dtype = torch.float64, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, ScanWeights]:
    generator = torch.Generator().manual_seed(num_tokens * 7 + taps)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = ScanWeights(
        conv_weight=randn(CHANNELS, taps),
        conv_bias=randn(CHANNELS) if bias else None,
        a_log=randn(HEADS),
        d=randn(HEADS),
        dt_bias=randn(HEADS),
        num_groups=GROUPS,
    )
    u, delta = randn(num_reqs, num_tokens, CHANNELS), randn(num_reqs, num_tokens, HEADS)
    return u, delta, randn(num_reqs, taps - 1, CHANNELS), randn(num_reqs, HEADS, HEAD_DIM, STATE), weights


def assert_all_close(actual: tuple[Tensor | None, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32_OP)])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 17, 64, 65, 200])
def test_scan_of_any_length_equals_the_recurrence(num_tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    case = inputs(3, num_tokens, dtype=dtype)
    assert_all_close(block_scan(*case), block_scan_reference(*case), tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 3, 5])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_any_number_of_taps_works(num_tokens: int, taps: int, bias: bool) -> None:
    case = inputs(2, num_tokens, taps, bias=bias)
    assert_all_close(block_scan(*case), block_scan_reference(*case), FLOAT64)


@pytest.mark.parametrize("lens", [[5, 0, 17], [1, 17, 2], [70, 3, 0]])
def test_ragged_rows_end_where_their_tokens_end(lens: list[int]) -> None:
    case, query_lens = inputs(3, max(lens)), torch.tensor(lens)
    y, conv, ssm = block_scan(*case, query_lens)
    expected_y, expected_conv, expected_ssm = block_scan_reference(*case, query_lens)
    assert_all_close((conv, ssm), (expected_conv, expected_ssm), FLOAT64)
    for row, length in enumerate(lens):
        torch.testing.assert_close(y[row, :length], expected_y[row, :length], atol=FLOAT64, rtol=FLOAT64)


def test_output_is_the_same_without_states() -> None:
    case = inputs(2, 16)
    y, conv, ssm = block_scan(*case, return_state=False)
    assert conv is None and ssm is None
    assert torch.equal(y, block_scan(*case)[0])


@pytest.mark.parametrize("num_tokens", [1, 7, 66])
def test_replay_of_any_prefix_equals_scanning_it(num_tokens: int) -> None:
    u, delta, conv, ssm, weights = inputs(1, num_tokens)
    for accepted in {0, 1, num_tokens // 2, num_tokens}:
        states = replay_scan(u, delta, conv, ssm, weights, torch.tensor([accepted]))
        expected = block_scan_reference(u[:, :accepted], delta[:, :accepted], conv, ssm, weights)[1:]
        assert_all_close(states, expected, FLOAT64)


@pytest.mark.parametrize("taps", [1, 2, 4, 6])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 7), (2, 5), (3, 1), (16, 6)])
def test_a_sequence_keeps_the_states_that_its_blocks_start_from(block_size: int, num_blocks: int, taps: int) -> None:
    u, delta, conv, ssm, weights = inputs(3, block_size * num_blocks, taps)
    y, convs, ssms = sequence_scan(u, delta, conv, ssm, weights, block_size)
    assert_all_close((y,), block_scan_reference(u, delta, conv, ssm, weights)[:1], FLOAT64)
    assert convs.shape[:2] == ssms.shape[:2] == (3, num_blocks)
    for block in range(1, num_blocks):
        before = block * block_size
        expected = block_scan_reference(u[:, :before], delta[:, :before], conv, ssm, weights)[1:]
        assert_all_close((convs[:, block], ssms[:, block]), expected, FLOAT64)
    assert_all_close((convs[:, 0], ssms[:, 0]), (conv, ssm), FLOAT64)


def test_inputs_are_left_alone() -> None:
    case = inputs(2, 20)
    before = [t.clone() for t in case[:4]]
    block_scan(*case)
    replay_scan(*case, torch.tensor([3, 0]))
    assert all(torch.equal(a, b) for a, b in zip(before, case[:4], strict=True))


def test_huge_decays_leave_finite_numbers() -> None:
    u, delta, conv, ssm, weights = inputs(1, 64, dtype=torch.float32)
    y, _, state = block_scan(u, delta + 500, conv, ssm, weights)
    assert state is not None
    assert torch.isfinite(y).all() and torch.isfinite(state).all()


def test_bfloat16_inputs_are_scanned_in_float32() -> None:
    u, delta, conv, ssm, weights = inputs(2, 16, dtype=torch.float32)
    narrow = (u.bfloat16(), delta.bfloat16(), conv.bfloat16(), ssm, weights)
    y, new_conv, new_ssm = block_scan(*narrow)
    expected = block_scan_reference(*narrow)
    assert new_conv is not None and new_conv.dtype == torch.bfloat16
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected[0], atol=5e-2, rtol=5e-2)  # one rounding of the convolution may differ
    torch.testing.assert_close(new_ssm, expected[2], atol=5e-2, rtol=5e-2)


def test_wrong_shapes_are_named() -> None:
    u, delta, conv, ssm, weights = inputs(2, 4)
    with pytest.raises(ValueError, match="u has 37 channels"):
        block_scan(u[..., :-1], delta, conv, ssm, weights)
    with pytest.raises(ValueError, match="conv_state is"):
        block_scan(u, delta, conv[:, 1:], ssm, weights)
    with pytest.raises(ValueError, match="delta is"):
        block_scan(u, delta[:, 1:], conv, ssm, weights)


@pytest.mark.parametrize("num_tokens", [1, 6, 17])
def test_replay_accepts_every_length_row_by_row(num_tokens: int) -> None:
    lengths = torch.arange(num_tokens + 1)
    u, delta, conv, ssm, weights = inputs(num_tokens + 1, num_tokens)
    states = replay_scan(u, delta, conv, ssm, weights, lengths)
    assert_all_close(states, block_scan_reference(u, delta, conv, ssm, weights, lengths)[1:], FLOAT64)


@pytest.mark.parametrize("taps", [1, 2, 3, 5])
def test_ragged_rows_work_with_any_number_of_taps(taps: int) -> None:
    # Rows shorter than the history keep part of the old one.
    case, query_lens = inputs(4, 6, taps), torch.tensor([0, 1, 2, 6])
    assert_all_close(block_scan(*case, query_lens)[1:], block_scan_reference(*case, query_lens)[1:], FLOAT64)


def test_padding_is_never_read() -> None:
    u, delta, conv, ssm, weights = inputs(2, 70)
    lens = torch.tensor([3, 66])
    expected = block_scan(u, delta, conv, ssm, weights, lens)
    for row, length in enumerate(lens.tolist()):
        u[row, length:], delta[row, length:] = 1e3, -1e3
    actual = block_scan(u, delta, conv, ssm, weights, lens)
    assert_all_close(actual[1:], (expected[1], expected[2]), FLOAT64)  # type: ignore[arg-type]
    for row, length in enumerate(lens.tolist()):
        torch.testing.assert_close(actual[0][row, :length], expected[0][row, :length], atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_result_does_not_depend_on_the_length_of_a_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = inputs(2, 33)
    expected = block_scan_reference(*case)
    monkeypatch.setattr("twotower_kernels.block_scan.op.SCAN_CHUNK", chunk)
    assert_all_close(block_scan(*case), expected, FLOAT64)


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_extreme_decays_equal_the_recurrence_over_several_chunks(shift: float) -> None:
    u, delta, conv, ssm, weights = inputs(1, 150)
    case = (u, delta + shift, conv, ssm, weights)
    expected = block_scan_reference(*case)
    scale = max(1.0, expected[2].abs().max().item())
    assert_all_close(block_scan(*case), expected, FLOAT64 * scale)


def test_small_decays_after_huge_ones_keep_their_precision() -> None:
    # A running sum of 10 000 in float32 has steps of 1e-3, in which the small decays that follow would be lost.
    u, delta, conv, ssm, weights = inputs(1, 64, dtype=torch.float32)
    delta[:, :40], delta[:, 40:] = 300.0, -5.0
    expected = block_scan_reference(u.double(), delta.double(), conv.double(), ssm.double(), weights)
    y, _, state = block_scan(u, delta, conv, ssm, weights)
    assert state is not None
    for actual, wanted in ((y[:, 40:], expected[0][:, 40:]), (state, expected[2])):
        scale = wanted.abs().max().item()
        assert (actual - wanted).abs().max().item() < FLOAT32_OP * scale
