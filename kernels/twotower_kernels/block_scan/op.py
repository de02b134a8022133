"""Public functions of the scan: checks, then a kernel on CUDA, else the chunked matrix form in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_kernels.backend import on_its_device, use_triton

# Tokens per scan chunk: the matrix form costs chunk^2 per token pair, the loop over chunks is what remains sequential.
SCAN_CHUNK = 64
# From this many tokens on a library's scan, which works on all chunks at once, is asked for on CUDA; our kernel goes
# through them one after the other. Not measured: below, the launches of a convolution in PyTorch alone take longer.
LONG_SCAN = 512


@dataclass(frozen=True)
class ScanWeights:
    """Parameters of one Mamba-2 layer that the scan reads.

    Attributes:
        conv_weight: [channels, taps]; the last tap multiplies the current token.
        conv_bias: [channels] or None.
        a_log: [heads]; the decay rate of a head is `-exp(a_log)`. This and the next two in the dtype of the SSM state.
        d: [heads], skip connection.
        dt_bias: [heads], added to the time step before softplus.
        num_groups: consecutive heads share B and C of one group.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    a_log: Tensor
    d: Tensor
    dt_bias: Tensor
    num_groups: int


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
    tokens beyond. From `LONG_SCAN` tokens on the recurrence is left to mamba-ssm or vLLM where one of them is there and
    right, see `long_scan.py`. On a CPU, for float64 models and under autograd PyTorch does it, 64 tokens at a time.

    Args:
        u: [num_reqs, num_tokens, channels], raw inputs of the convolution; channels = x | B | C.
        delta: [num_reqs, num_tokens, heads], raw time steps.
        conv_state: [num_reqs, taps - 1, channels], the raw inputs before the block, oldest first. Not modified.
        ssm_state: [num_reqs, heads, head_dim, state_size], float32 (float64 for float64 models). Not modified.
        weights: parameters of the layer.
        query_lens: int64 [num_reqs], valid tokens per row, or None if all are. Outputs beyond are undefined, but they
            depend on nothing of other rows.
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
        y, new_ssm = _one_token(x, b, c, step, ssm_state, weights)
    else:
        chunk = min(u.shape[1], SCAN_CHUNK)
        y, states = _chunked(x, b, c, step, ssm_state, weights, chunk, want_output=True, want_state=return_state)
        new_ssm = states[-1]
    y = y.flatten(2)
    if not return_state:
        return y, None, None
    return y, last_inputs(window, conv_state.shape[1], query_lens), new_ssm


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
    y, states = _chunked(x, b, c, step, ssm_state, weights, chunk=block_size, want_output=True, want_state=False)
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
    _, states = _chunked(x, b, c, step, ssm_state, weights, chunk, want_output=False, want_state=True)
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


def scan_inputs(
    u: Tensor, delta: Tensor, window: Tensor, ssm_state: Tensor, weights: ScanWeights, query_lens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolution, SiLU and softplus: x [r, t, h, p], B and C [r, t, g, n], time step [r, t, h]; padding has step 0."""
    num_tokens = u.shape[1]
    heads, head_dim, state_size = ssm_state.shape[1:]
    groups, acc = weights.num_groups, ssm_state.dtype
    mixed = _convolution(window, num_tokens, weights, acc)
    if u.dtype != acc:
        # The convolution kernel of the published code returns its input dtype; the scan then widens again.
        mixed, delta = mixed.to(u.dtype).to(acc), delta.to(acc)
    step = F.softplus(delta + weights.dt_bias)
    if query_lens is not None:
        padding = torch.arange(num_tokens, device=u.device) >= query_lens[:, None]
        step = step.masked_fill(padding[:, :, None], 0.0)
    x, bc = mixed.split([heads * head_dim, 2 * groups * state_size], dim=-1)
    b, c = bc.unflatten(-1, (2 * groups, state_size)).split(groups, dim=2)
    return x.unflatten(-1, (heads, head_dim)), b, c, step


def _convolution(window: Tensor, num_tokens: int, weights: ScanWeights, acc: torch.dtype) -> Tensor:
    """Depthwise convolution over the window's last `num_tokens` positions, and SiLU: [r, t, channels]."""
    taps, bias = weights.conv_weight.t(), weights.conv_bias
    if window.dtype != acc:
        window, taps, bias = window.to(acc), taps.to(acc), None if bias is None else bias.to(acc)
    if num_tokens == 1:
        mixed = (window * taps).sum(1, keepdim=True)
        return F.silu(mixed if bias is None else mixed + bias)
    first = window[:, :num_tokens]
    mixed = first * taps[0] if bias is None else torch.addcmul(bias, first, taps[0])
    for k in range(1, len(taps)):
        mixed = torch.addcmul(mixed, window[:, k : k + num_tokens], taps[k])
    return F.silu(mixed)


def last_inputs(window: Tensor, history: int, query_lens: Tensor | None) -> Tensor:
    """The newest `history` valid rows of a window that starts with `history` earlier ones."""
    if query_lens is None:
        return window[:, window.shape[1] - history :]
    index = query_lens[:, None] + torch.arange(history, device=window.device)
    return window.gather(1, index[:, :, None].expand(-1, -1, window.shape[2]))


def _one_token(
    x: Tensor, b: Tensor, c: Tensor, step: Tensor, ssm_state: Tensor, weights: ScanWeights
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for blocks of one token."""
    num_reqs, heads, head_dim, state_size = ssm_state.shape
    groups = weights.num_groups
    step = step[:, 0]
    decay = torch.exp(step * -torch.exp(weights.a_log))
    drive = (step[:, :, None] * x[:, 0]).reshape(num_reqs * groups, -1, 1)
    decayed = (ssm_state * decay[:, :, None, None]).view(num_reqs * groups, -1, state_size)
    state = torch.baddbmm(decayed, drive, b[:, 0].reshape(num_reqs * groups, 1, state_size))
    state = state.view(num_reqs, groups, -1, state_size)
    y = torch.matmul(state, c[:, 0, :, :, None]).view(num_reqs, 1, heads, head_dim)
    return torch.addcmul(y, x, weights.d[:, None]), state.view_as(ssm_state)


def _chunked(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    step: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    chunk: int,
    want_output: bool,
    want_state: bool,
) -> tuple[Tensor, list[Tensor]]:
    """All chunks at once, as rows: inside a chunk a masked matrix product, between chunks the carried state.

    Returns:
        Output [r, t, h, p], and the states at the start of every chunk; with `want_state` that after the last one too.
    """
    num_reqs, num_tokens, heads, head_dim = x.shape
    num_chunks = -(-num_tokens // chunk)
    if num_chunks > 1:
        x, b, c, step = (_chunks_as_rows(t, chunk) for t in (x, b, c, step))
    b, c, step = b.transpose(1, 2), c.transpose(1, 2), step.transpose(1, 2)  # [r, g, t, n] twice, [r, h, t]
    # Sums of many decays lose the small differences that matter: they are formed in float64.
    log_decay = (step * -torch.exp(weights.a_log)[:, None]).double().cumsum(-1)
    states = [ssm_state]
    if num_chunks > 1 or want_state:
        states += _next_states(x, b, step, log_decay, ssm_state, num_chunks - (not want_state))
    if not want_output:
        return x, states
    start = ssm_state if num_chunks == 1 else torch.stack(states[:num_chunks], dim=1).flatten(0, 1)
    y = x * weights.d[:, None]
    y = y + _from_state(c, log_decay, start) + _from_chunk(x, b, c, step, log_decay)
    return y.view(num_reqs, -1, heads, head_dim)[:, :num_tokens], states


def _chunks_as_rows(x: Tensor, chunk: int) -> Tensor:
    """[r, t, ...] to [r * k, chunk, ...], zeros behind."""
    padding = -x.shape[1] % chunk
    if padding:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
    return x.reshape(-1, chunk, *x.shape[2:])


def _next_states(
    x: Tensor, b: Tensor, step: Tensor, log_decay: Tensor, ssm_state: Tensor, num_states: int
) -> list[Tensor]:
    """States after the first `num_states` chunks of every request, each [r, h, p, n]."""
    num_reqs, groups = len(ssm_state), b.shape[1]
    whole = log_decay[..., -1:]
    to_end = torch.exp(whole - log_decay).to(step.dtype) * step
    driven = (x * to_end.transpose(1, 2)[..., None]).flatten(2).unflatten(2, (groups, -1))
    # Copied by whole rows here; the product would copy it number by number.
    driven = driven.transpose(1, 2).contiguous()  # [r, g, t, per_group * p]
    ends = torch.matmul(driven.transpose(2, 3), b).view(num_reqs, -1, *ssm_state.shape[1:])  # [r, k, h, p, n]
    carry = torch.exp(whole).to(step.dtype).view(num_reqs, -1, ssm_state.shape[1], 1, 1)
    states = [ssm_state]
    for k in range(num_states):
        states.append(torch.addcmul(ends[:, k], states[-1], carry[:, k]))
    return states[1:]


def _from_state(c: Tensor, log_decay: Tensor, start: Tensor) -> Tensor:
    """What the state before a chunk [r, h, p, n] adds to its outputs: [r, t, h, p]."""
    rows, groups = c.shape[:2]
    _, heads, head_dim, state_size = start.shape
    read = torch.matmul(c, start.view(rows, groups, -1, state_size).transpose(2, 3))  # [r, g, t, per_group * p]
    read = read.transpose(1, 2).reshape(rows, -1, heads, head_dim)
    return read * torch.exp(log_decay).to(c.dtype).transpose(1, 2)[..., None]


def _from_chunk(x: Tensor, b: Tensor, c: Tensor, step: Tensor, log_decay: Tensor) -> Tensor:
    """What a chunk's own tokens add to its outputs: [r, t, h, p]."""
    groups = b.shape[1]
    # [r, h, t, t']: how much of token t' is left at token t. Capped before exp, which overflows above the diagonal.
    gap = (log_decay[..., :, None] - log_decay[..., None, :]).clamp(max=0.0)
    mixing = torch.exp(gap.to(step.dtype)) * step[..., None, :]
    similarity = torch.matmul(c, b.transpose(2, 3)).tril()
    mixing = (mixing.unflatten(1, (groups, -1)) * similarity[:, :, None]).flatten(1, 2)
    return torch.matmul(mixing, x.transpose(1, 2)).transpose(1, 2)
