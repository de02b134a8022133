"""Choice of the scan for long prefills: faulty candidates are refused, and the choice is logged."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_block_scan_kernel import assert_close, inputs
from tests.support.tolerances import FLOAT32_OP
from twotower_kernels.block_scan import block_scan, register_long_scan, varlen_scan
from twotower_kernels.block_scan import long_scan as room
from twotower_kernels.block_scan.long_scan import LongScan, choose_long_scan
from twotower_kernels.block_scan.reference import block_scan_reference

HEAD_DIM, STATE = 3, 5


@pytest.fixture(autouse=True)
def _no_candidates(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Starts without candidates or choices, and forgets those of a test."""
    monkeypatch.setattr(room, "_loaders", {})
    monkeypatch.setattr(room, "_chosen", {})
    with caplog.at_level(logging.INFO, logger="twotower_kernels"):
        yield


def chosen(device: torch.device, dtype: torch.dtype = torch.float32) -> LongScan | None:
    return choose_long_scan(device, dtype, HEAD_DIM, STATE)


def right_scan(
    x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, in float32 inside."""
    state, outputs, per_group = ssm_state, [], x.shape[2] // b.shape[2]
    b, c = (t.float().repeat_interleave(per_group, dim=2) for t in (b, c))
    for t in range(x.shape[1]):
        driven = (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = torch.exp(step[:, t] * a)[..., None, None] * state + driven
        outputs.append((state * c[:, t, :, None]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(outputs, dim=1).to(x.dtype), state


def ignores_the_initial_state(*args: Tensor) -> tuple[Tensor, Tensor]:
    return right_scan(*args[:-1], torch.zeros_like(args[-1]))


def forgets_the_initial_state_after_one_chunk(x: Tensor, step: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    *rest, ssm_state = rest
    a, b, c, d = rest
    cut = room.CHUNK
    y, _ = right_scan(x[:, :cut], step[:, :cut], a, b[:, :cut], c[:, :cut], d, ssm_state)
    rest_of_y, state = ignores_the_initial_state(x[:, cut:], step[:, cut:], a, b[:, cut:], c[:, cut:], d, ssm_state)
    return torch.cat([y, rest_of_y], dim=1), state


def drops_the_last_ragged_chunk(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    y, state = right_scan(x, *rest)
    y[:, x.shape[1] // room.CHUNK * room.CHUNK :] = 0
    return y, state


def returns_the_state_before(*args: Tensor) -> tuple[Tensor, Tensor]:
    return right_scan(*args)[0], args[-1]


def wrong_in_one_token(*args: Tensor) -> tuple[Tensor, Tensor]:
    y, state = right_scan(*args)
    y[0, 200] *= 1.1
    return y, state


def returns_nan(*args: Tensor) -> tuple[Tensor, Tensor]:
    y, state = right_scan(*args)
    y[0, 7] = torch.nan
    return y, state


def raises(*args: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image is available")


def loads_as(scan: LongScan) -> Callable[[], LongScan]:
    return lambda: scan


def test_the_first_right_candidate_is_chosen_and_logged(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    register_long_scan("first", loads_as(right_scan))
    register_long_scan("second", loads_as(raises))
    assert chosen(device) is right_scan
    assert caplog.messages == [f"long scans on {device} in torch.float32 are run by first"]


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        (ignores_the_initial_state, "output is off by"),
        (forgets_the_initial_state_after_one_chunk, "output is off by"),
        (drops_the_last_ragged_chunk, "output is off by 1.0e+00; "),
        (returns_the_state_before, "state is off by"),
        (wrong_in_one_token, "output is off by 1.0e-01; "),
        (returns_nan, "output is off by nan; "),
        (raises, "it raises RuntimeError('no kernel image is available')"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_faulty_candidate_is_refused_with_the_reason(
    faulty: LongScan, reason: str, dtype: torch.dtype, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    register_long_scan("faulty", loads_as(faulty))
    register_long_scan("right", loads_as(right_scan))
    assert chosen(device, dtype) is right_scan
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.startswith(f"long scans: faulty is refused: {reason}")


def test_a_candidate_that_is_not_installed_or_does_not_load_is_passed_over(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    def absent() -> LongScan:
        raise ImportError("No module named 'mamba_ssm'")

    def broken() -> LongScan:
        raise AttributeError("no mamba_chunk_scan_combined_varlen")

    register_long_scan("absent", absent)
    register_long_scan("broken", broken)
    register_long_scan("right", loads_as(right_scan))
    assert chosen(device) is right_scan
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.INFO, "long scans: absent is not installed (No module named 'mamba_ssm')"),
        (logging.WARNING, "long scans: broken does not load: AttributeError('no mamba_chunk_scan_combined_varlen')"),
        (logging.INFO, f"long scans on {device} in torch.float32 are run by right"),
    ]


def test_ours_is_left_when_no_candidate_is_right(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    register_long_scan("faulty", loads_as(ignores_the_initial_state))
    assert chosen(device) is None
    assert caplog.messages[-1] == f"long scans on {device} in torch.float32 are run by twotower_kernels"


def test_tf32_is_good_enough_for_bfloat16_and_not_for_float32(device: torch.device) -> None:
    def tf32_scan(*args: Tensor) -> tuple[Tensor, Tensor]:
        x, *rest, ssm_state = args
        y, state = right_scan(x, *rest, ssm_state * (1 + 2**-10))
        return y, state

    register_long_scan("tf32", loads_as(tf32_scan))
    assert chosen(device, torch.float32) is None
    assert chosen(device, torch.bfloat16) is tf32_scan


def test_the_choice_is_made_once_until_another_candidate_comes(device: torch.device) -> None:
    loaded: list[str] = []

    def load(name: str, scan: LongScan) -> Callable[[], LongScan]:
        def loader() -> LongScan:
            loaded.append(name)
            return scan

        return loader

    register_long_scan("faulty", load("faulty", ignores_the_initial_state))
    assert chosen(device) is None and chosen(device) is None
    assert loaded == ["faulty"]
    register_long_scan("right", load("right", right_scan))
    assert chosen(device) is right_scan
    assert loaded == ["faulty", "faulty", "right"]


def test_mamba_ssm_is_asked_before_what_others_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert next(iter(room._loaders)) == "mamba-ssm"


def strict_varlen(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, *, out: Tensor, **given: Any
) -> Tensor:
    """Reads the layout as vLLM's kernels do: states pass only from chunk to chunk of one request."""
    bounds, owners = given["cu_chunk_seqlens"].tolist(), given["seq_idx"].tolist()
    assert given["cu_seqlens"].tolist() == [bounds[0], *(bounds[last + 1] for last in given["last_chunk_indices"])]
    after: list[Tensor] = []
    for chunk, owner in enumerate(owners):
        part = slice(bounds[chunk], bounds[chunk + 1])
        assert 0 < part.stop - part.start <= chunk_size
        goes_on = chunk > 0 and owners[chunk - 1] == owner
        before = after[-1] if goes_on else given["initial_states"][owner : owner + 1]
        y, state = right_scan(x[None, part], dt[None, part], A, B[None, part], C[None, part], given["D"], before)
        out[part] = y[0]
        after.append(state)
    return torch.cat([after[last] for last in given["last_chunk_indices"]]).to(given["state_dtype"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_requests_in_one_row_keep_their_chunks_apart(dtype: torch.dtype, device: torch.device) -> None:
    register_long_scan("varlen", lambda: varlen_scan(strict_varlen))
    assert chosen(device, dtype) is not None


@pytest.mark.slow  # it imports vLLM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_of_the_installed_vllm_is_right(dtype: torch.dtype, device: torch.device) -> None:
    ops = pytest.importorskip("vllm.model_executor.layers.mamba.ops.ssd_combined")
    register_long_scan("vllm", lambda: varlen_scan(ops.mamba_chunk_scan_combined_varlen))
    if device.type == "cpu" or dtype != torch.float32:  # on a GPU it multiplies float32 in TF32
        assert choose_long_scan(device, dtype, 64, 128) is not None


@pytest.mark.parametrize("return_state", [True, False])
def test_long_scans_go_through_the_chosen_candidate(
    return_state: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower_kernels.block_scan.op.use_triton", lambda *tensors: True)
    monkeypatch.setattr("twotower_kernels.block_scan.op.LONG_SCAN", 21)
    lens_of_calls: list[int] = []

    def counting_scan(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        lens_of_calls.append(x.shape[1])
        return right_scan(x, *rest)

    register_long_scan("counting", loads_as(counting_scan))
    case, lens = inputs(device, 3, 21), torch.tensor([21, 0, 4], device=device)
    y, conv, ssm = block_scan(*case, lens, return_state)
    assert lens_of_calls[-1] == 21
    expected = block_scan_reference(*case, lens)
    for row, length in enumerate(lens.tolist()):
        assert_close(y[row, :length], expected[0][row, :length])
    if return_state:
        assert conv is not None and torch.equal(conv, expected[1])
        assert_close(ssm, expected[2])
    else:
        assert conv is None and ssm is None
    calls = len(lens_of_calls)
    shorter = inputs(device, 1, 20)
    torch.testing.assert_close(block_scan(*shorter)[0], block_scan_reference(*shorter)[0], atol=FLOAT32_OP, rtol=1e-4)
    assert len(lens_of_calls) == calls


def test_our_kernel_runs_long_scans_that_no_candidate_can(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower_kernels.block_scan.op.use_triton", lambda *tensors: True)
    monkeypatch.setattr("twotower_kernels.block_scan.op.LONG_SCAN", 66)
    register_long_scan("faulty", loads_as(ignores_the_initial_state))
    case = inputs(device, 1, 66)
    for actual, expected in zip(block_scan(*case), block_scan_reference(*case), strict=True):
        assert_close(actual, expected)
