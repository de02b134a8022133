"""Public functions of the scan: checks, then a kernel on CUDA, else the chunked matrix form in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_kernels.backend import on_its_device, use_triton
from twotower_kernels.block_scan.chunked import chunked, last_inputs, one_token, scan_inputs
from twotower_kernels.block_scan.types import ScanWeights

# Tokens per chunk: a chunk costs its square in the matrix form, and only the loop over chunks is sequential.
SCAN_CHUNK = 64
# From this many tokens on, CUDA uses a library's scan, which works on all chunks at once; our kernel takes them one
# after the other. Below, the launches of a convolution in PyTorch alone would take longer. An estimate, not measured.
LONG_SCAN = 512


def block_scan(
    u: Tensor,
    delta: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    query_lens: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Runs a block of tokens through convolution and state-space recurrence, from a given state.

    On CUDA a float32 state is scanned by our kernel, convolution included: in one launch up to 32 tokens, in one per 32
    tokens beyond. From `LONG_SCAN` tokens on the recurrence is left to mamba-ssm or vLLM, where one is installed and
    right (see `long_scan.py`). On a CPU, for float64 models and under autograd PyTorch does it, 64 tokens at a time.

    Args:
        u: [num_reqs, num_tokens, channels], raw inputs of the convolution; channels = x | B | C.
        delta: [num_reqs, num_tokens, heads], raw time steps.
        conv_state: [num_reqs, taps - 1, channels], the raw inputs before the block, oldest first. Not modified.
        ssm_state: [num_reqs, heads, head_dim, state_size], float32 (float64 for float64 models). Not modified.
        weights: parameters of the layer.
        query_lens: int64 [num_reqs], valid tokens per row, or None if all are. Outputs beyond are undefined, but do
            not depend on other rows.
        return_state: whether the states after the block are computed.

    Returns:
        Output [num_reqs, num_tokens, heads * head_dim] in the dtype of `ssm_state`, and the convolution and SSM states
        after the last valid token of each row (None without `return_state`).

    Raises:
        ValueError: shapes do not fit.

    Source: Mamba-2 (Dao & Gu 2024), section 6, the block decomposition of the semiseparable matrix.
    """
    _check(u, delta, conv_state, ssm_state, weights)
    if _has_kernel(u, delta, conv_state, ssm_state, weights):
        return _block_scan_on_gpu(u, delta, conv_state, ssm_state, weights, query_lens, return_state)
    window = torch.cat([conv_state, u], dim=1)
    x, b, c, step = scan_inputs(u, delta, window, ssm_state, weights, query_lens)
    if u.shape[1] == 1:
        y, new_ssm = one_token(x, b, c, step, ssm_state, weights)
    else:
        chunk = min(u.shape[1], SCAN_CHUNK)
        y, states = chunked(x, b, c, step, ssm_state, weights, chunk, want_output=True, want_state=return_state)
        new_ssm = states[-1]
    y = y.flatten(2)
    if not return_state:
        return y, None, None
    return y, last_inputs(window, conv_state.shape[1], query_lens), new_ssm


def pool_scan(
    u: Tensor,
    delta: Tensor,
    conv_pool: Tensor,
    ssm_pool: Tensor,
    slots: Tensor | slice,
    weights: ScanWeights,
    query_lens: Tensor | None = None,
    new_conv: Tensor | None = None,
) -> Tensor:
    """Runs a block of tokens from states of a pool, and lets SSM states be those after it.

    On CUDA up to `LONG_SCAN` tokens are scanned where the states lie, and no copy of a state is made.

    Args:
        u, delta, weights, query_lens: as `block_scan` takes them.
        conv_pool: [num_slots, taps - 1, channels], raw inputs of the convolution before the block.
        ssm_pool: [num_slots, heads, head_dim, state_size], float32 (float64 for float64 models).
        slots: int64 [num_reqs], or a slice, of the requests; each is named once, but for one that nobody reads.
        new_conv: [num_reqs, taps - 1, channels], contiguous; becomes the raw inputs up to the last valid token of each
            row, for the caller to move to the pool. None leaves SSM states as they are, too.

    Returns:
        Output as `block_scan`.
    """
    if _has_kernel(u, delta, conv_pool, ssm_pool, weights) and _fits_in_place(u, conv_pool, ssm_pool, new_conv):
        from twotower_kernels.block_scan.kernel import launch_pool_scan

        rows = None if isinstance(slots, slice) else slots
        pools = (conv_pool[slots], ssm_pool[slots]) if isinstance(slots, slice) else (conv_pool, ssm_pool)
        return launch_pool_scan(u, delta, *pools, rows, weights, query_lens, new_conv)
    y, last_conv, new_ssm = block_scan(
        u, delta, conv_pool[slots], ssm_pool[slots], weights, query_lens, return_state=new_conv is not None
    )
    if new_conv is not None and last_conv is not None and new_ssm is not None:
        ssm_pool[slots] = new_ssm
        new_conv.copy_(last_conv)
    return y


def _fits_in_place(u: Tensor, conv_pool: Tensor, ssm_pool: Tensor, new_conv: Tensor | None) -> bool:
    """Whether the kernel can read a pool as it is; beyond one launch it also writes the states in between."""
    from twotower_kernels.block_scan.kernel import MOST_TOKENS

    most = MOST_TOKENS if new_conv is None else LONG_SCAN - 1
    in_order = conv_pool.stride(-1) == 1 and ssm_pool[:1].is_contiguous()
    return u.shape[1] <= most and conv_pool.dtype == u.dtype and in_order


def sequence_scan(
    u: Tensor, delta: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: ScanWeights, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs whole sequences of blocks, and keeps the states that every block starts from.

    Args:
        u, delta, conv_state, ssm_state, weights: as `block_scan`.
        block_size: divides num_tokens.

    Returns:
        Output as `block_scan`, and the convolution and SSM states at the start of every block,
        [num_reqs, num_blocks, ...].
    """
    _check(u, delta, conv_state, ssm_state, weights)
    window = torch.cat([conv_state, u], dim=1)
    x, b, c, step = scan_inputs(u, delta, window, ssm_state, weights, None)
    y, states = chunked(x, b, c, step, ssm_state, weights, chunk=block_size, want_output=True, want_state=False)
    histories = window.unfold(1, conv_state.shape[1], block_size)[:, : len(states)].transpose(2, 3)
    return y.flatten(2), histories, torch.stack(states, dim=1)


def replay_scan(
    u: Tensor,
    delta: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    num_accepted: Tensor,
) -> tuple[Tensor, Tensor]:
    """States after the first `num_accepted` tokens of a block, from the state before it; no projection is repeated.

    Args:
        u, delta, conv_state, ssm_state, weights: as `block_scan` was given them.
        num_accepted: int64 [num_reqs], 0 to num_tokens; 0 gives the state before the block.

    Returns:
        Convolution and SSM states, shaped like the inputs.
    """
    _check(u, delta, conv_state, ssm_state, weights)
    if _has_kernel(u, delta, conv_state, ssm_state, weights):
        from twotower_kernels.block_scan.kernel import launch_scan

        _, conv, ssm = launch_scan(
            u, delta, conv_state, ssm_state, weights, num_accepted, want_output=False, want_state=True
        )
        assert conv is not None and ssm is not None
        return conv, ssm
    window = torch.cat([conv_state, u], dim=1)
    x, b, c, step = scan_inputs(u, delta, window, ssm_state, weights, num_accepted)
    chunk = min(u.shape[1], SCAN_CHUNK)
    _, states = chunked(x, b, c, step, ssm_state, weights, chunk, want_output=False, want_state=True)
    return last_inputs(window, conv_state.shape[1], num_accepted), states[-1]


def warm_up(device: torch.device, dtype: torch.dtype, head_dim: int, state_size: int) -> None:
    """Chooses who runs long scans, before a request waits for it; nothing where no kernels run.

    Args:
        device, dtype: of the model.
        head_dim, state_size: of its SSM states.
    """
    if dtype != torch.float64 and use_triton(torch.empty(0, device=device)):
        from twotower_kernels.block_scan.long_scan import choose_long_scan

        choose_long_scan(device, dtype, head_dim, state_size)


def _has_kernel(u: Tensor, delta: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: ScanWeights) -> bool:
    tensors = (delta, conv_state, ssm_state, weights.conv_weight, weights.a_log, weights.d, weights.dt_bias)
    return ssm_state.dtype == torch.float32 and use_triton(u, *tensors, weights.conv_bias)


@on_its_device
def _block_scan_on_gpu(
    u: Tensor,
    delta: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    query_lens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from twotower_kernels.block_scan.kernel import launch_scan

    if u.shape[1] >= LONG_SCAN:
        from twotower_kernels.block_scan.long_scan import choose_long_scan, scan_with

        scan = choose_long_scan(u.device, u.dtype, *ssm_state.shape[2:])
        if scan is not None:
            y, conv, ssm = scan_with(scan, u, delta, conv_state, ssm_state, weights, query_lens)
            return (y, conv, ssm) if return_state else (y, None, None)
    output, new_conv, new_ssm = launch_scan(
        u, delta, conv_state, ssm_state, weights, query_lens, want_output=True, want_state=return_state
    )
    assert output is not None
    return output, new_conv, new_ssm


def _check(u: Tensor, delta: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: ScanWeights) -> None:
    num_reqs, num_tokens, channels = u.shape
    heads, head_dim, state_size = ssm_state.shape[1:]
    if channels != heads * head_dim + 2 * weights.num_groups * state_size:
        raise ValueError(
            f"u has {channels} channels; {heads} heads of {head_dim} and 2 x {weights.num_groups} groups of "
            f"{state_size} need {heads * head_dim + 2 * weights.num_groups * state_size}"
        )
    taps = weights.conv_weight.shape[1]
    if conv_state.shape != (num_reqs, taps - 1, channels):
        raise ValueError(f"conv_state is {tuple(conv_state.shape)}; expected {(num_reqs, taps - 1, channels)}")
    if delta.shape != (num_reqs, num_tokens, heads):
        raise ValueError(f"delta is {tuple(delta.shape)}; expected {(num_reqs, num_tokens, heads)}")
