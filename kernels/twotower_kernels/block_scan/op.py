"""Public functions of the scan: checks, then the chunked matrix form (or one recurrence step for one token)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens per scan chunk: the matrix form costs chunk^2 per token pair, the loop over chunks is what remains sequential.
SCAN_CHUNK = 64


@dataclass(frozen=True)
class ScanWeights:
    """Parameters of one Mamba-2 layer that the scan reads.

    Attributes:
        conv_weight: [channels, taps]; the last tap multiplies the current token.
        conv_bias: [channels] or None.
        a_log: [heads]; the decay rate of a head is `-exp(a_log)`.
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

    Args:
        u: [num_reqs, num_tokens, channels], raw inputs of the convolution; channels = x | B | C.
        delta: [num_reqs, num_tokens, heads], raw time steps.
        conv_state: [num_reqs, taps - 1, channels], the raw inputs before the block, oldest first. Not modified.
        ssm_state: [num_reqs, heads, head_dim, state_size], float32 (float64 for float64 models). Not modified.
        weights: parameters of the layer.
        query_lens: int64 [num_reqs], valid tokens per row, or None if all are. Outputs beyond are undefined.
        return_state: whether the states after the block are computed.

    Returns:
        Output [num_reqs, num_tokens, heads * head_dim] in the dtype of `ssm_state`, and the convolution and SSM states
        after the last valid token of each row (None without `return_state`).

    Raises:
        ValueError: shapes do not fit.

    Source: Mamba-2 (Dao & Gu 2024), section 6, the block decomposition of the semiseparable matrix.
    """
    _check(u, delta, conv_state, ssm_state, weights)
    window = torch.cat([conv_state, u], dim=1)
    x, b, c, step = _scan_inputs(u, delta, window, ssm_state, weights, query_lens)
    if u.shape[1] == 1:
        y, new_ssm = _one_token(x, b, c, step, ssm_state, weights)
    else:
        chunk = min(u.shape[1], SCAN_CHUNK)
        y, states = _chunked(x, b, c, step, ssm_state, weights, chunk, want_output=True, want_state=return_state)
        new_ssm = states[-1]
    y = torch.addcmul(y, x, weights.d.to(y.dtype)[:, None]).flatten(2)
    if not return_state:
        return y, None, None
    return y, _last_inputs(window, conv_state.shape[1], query_lens), new_ssm


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
    x, b, c, step = _scan_inputs(u, delta, window, ssm_state, weights, None)
    y, states = _chunked(x, b, c, step, ssm_state, weights, chunk=block_size, want_output=True, want_state=False)
    y = torch.addcmul(y, x, weights.d.to(y.dtype)[:, None]).flatten(2)
    histories = window.unfold(1, conv_state.shape[1], block_size)[:, : len(states)].transpose(2, 3)
    return y, histories, torch.stack(states, dim=1)


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
    window = torch.cat([conv_state, u], dim=1)
    x, b, c, step = _scan_inputs(u, delta, window, ssm_state, weights, num_accepted)
    chunk = min(u.shape[1], SCAN_CHUNK)
    _, states = _chunked(x, b, c, step, ssm_state, weights, chunk, want_output=False, want_state=True)
    return _last_inputs(window, conv_state.shape[1], num_accepted), states[-1]


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


def _scan_inputs(
    u: Tensor, delta: Tensor, window: Tensor, ssm_state: Tensor, weights: ScanWeights, query_lens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolution, SiLU and softplus: x [r, t, h, p], B and C [r, t, g, n], time step [r, t, h]; padding has step 0."""
    num_tokens = u.shape[1]
    heads, head_dim, state_size = ssm_state.shape[1:]
    acc = ssm_state.dtype
    taps = weights.conv_weight.to(acc).t()
    window = window.to(acc)
    if num_tokens == 1:
        mixed = (window * taps).sum(1, keepdim=True)
    else:
        mixed = window[:, :num_tokens] * taps[0]
        for k in range(1, len(taps)):
            mixed = torch.addcmul(mixed, window[:, k : k + num_tokens], taps[k])
    if weights.conv_bias is not None:
        mixed = mixed + weights.conv_bias.to(acc)
    # The convolution kernel of the published code returns its input dtype; the scan then widens again.
    mixed = F.silu(mixed).to(u.dtype).to(acc)
    d_inner, d_bc = heads * head_dim, weights.num_groups * state_size
    x, b, c = mixed.split([d_inner, d_bc, d_bc], dim=-1)
    step = F.softplus(delta.to(acc) + weights.dt_bias.to(acc))
    if query_lens is not None:
        padding = torch.arange(num_tokens, device=u.device) >= query_lens[:, None]
        step = step.masked_fill(padding[:, :, None], 0.0)
    groups = weights.num_groups
    return (
        x.unflatten(-1, (heads, head_dim)),
        b.unflatten(-1, (groups, state_size)),
        c.unflatten(-1, (groups, state_size)),
        step,
    )


def _last_inputs(window: Tensor, history: int, query_lens: Tensor | None) -> Tensor:
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
    decay = torch.exp(step * -torch.exp(weights.a_log.to(step.dtype)))
    drive = (step[:, :, None] * x[:, 0]).reshape(num_reqs * groups, -1, 1)
    decayed = (ssm_state * decay[:, :, None, None]).view(num_reqs * groups, -1, state_size)
    state = torch.baddbmm(decayed, drive, b[:, 0].reshape(num_reqs * groups, 1, state_size))
    state = state.view(num_reqs, groups, -1, state_size)
    y = torch.matmul(state, c[:, 0, :, :, None])
    return y.view(num_reqs, 1, heads, head_dim), state.view_as(ssm_state)


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
    """All chunks at once: inside a chunk a masked matrix product, between chunks the carried state.

    Returns:
        Output, and the states at the start of every chunk; with `want_state` that after the last one too.
    """
    num_reqs, num_tokens, heads, head_dim = x.shape
    groups, state_size = b.shape[2:]
    per_group = heads // groups
    padding = -num_tokens % chunk
    if padding:
        x, b, c = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x, b, c))
        step = F.pad(step, (0, 0, 0, padding))
    num_chunks = (num_tokens + padding) // chunk
    x, b, c, step = (t.unflatten(1, (num_chunks, chunk)) for t in (x, b, c, step))

    decay_rate = -torch.exp(weights.a_log.to(step.dtype))
    # Sums of many decays lose the small differences that matter: they are formed in float64. [r, k, h, t]
    log_decay = (step * decay_rate).transpose(2, 3).double().cumsum(-1)
    step = step.transpose(2, 3)
    b, c = b.transpose(2, 3), c.transpose(2, 3)  # [r, k, g, t, n]

    # Drive of every chunk at its own end, and the state each chunk starts from: [r, k, g, per_group * p, n].
    state = ssm_state.view(num_reqs, groups, per_group * head_dim, state_size)
    starts = [state]
    if num_chunks > 1 or want_state:
        to_end = torch.exp(log_decay[..., -1:] - log_decay).to(step.dtype) * step
        driven = x * to_end.transpose(2, 3)[..., None]
        driven = driven.reshape(num_reqs, num_chunks, chunk, groups, -1).permute(0, 1, 3, 4, 2)
        ends = torch.matmul(driven, b)
        carry = torch.exp(log_decay[..., -1]).to(step.dtype).repeat_interleave(head_dim, dim=2)
        carry = carry.view(num_reqs, num_chunks, groups, -1, 1)
        for k in range(num_chunks if want_state else num_chunks - 1):
            starts.append(torch.addcmul(ends[:, k], starts[-1], carry[:, k]))
    states = [state.view_as(ssm_state) for state in starts]
    if not want_output:
        return x, states

    # [r, k, h, t, t']: how much of token t' is left at token t. Masked before exp, which overflows above the diagonal.
    gap = log_decay[..., :, None] - log_decay[..., None, :]
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    mixing = torch.exp(gap.masked_fill_(future, -torch.inf).to(step.dtype)) * step[..., None, :]
    similarity = torch.matmul(c, b.transpose(-1, -2))
    mixing = (mixing.unflatten(2, (groups, per_group)) * similarity[:, :, :, None]).flatten(2, 3)
    inside = torch.matmul(mixing, x.transpose(2, 3))

    start = torch.stack(starts[:num_chunks], dim=1)
    carried = torch.matmul(c, start.transpose(-1, -2))  # [r, k, g, t, per_group * p]
    carried = carried.unflatten(-1, (per_group, head_dim)).transpose(3, 4).flatten(2, 3)
    y = torch.addcmul(inside, carried, torch.exp(log_decay).to(step.dtype)[..., None])
    return y.transpose(2, 3).reshape(num_reqs, -1, heads, head_dim)[:, :num_tokens], states
