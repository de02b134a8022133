"""The scan in PyTorch: convolution, then chunks of tokens as matrix products, all chunks at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_kernels.block_scan.types import ScanWeights


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


def one_token(
    x: Tensor, b: Tensor, c: Tensor, step: Tensor, ssm_state: Tensor, weights: ScanWeights
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence itself, for blocks of one token."""
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


def chunked(
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
    """Scans all chunks at once, as rows: a masked matrix product inside a chunk, the carried state between chunks.

    Returns:
        Output [r, t, h, p], and the states at the start of every chunk; with `want_state` that after the last one too.
    """
    num_reqs, num_tokens, heads, head_dim = x.shape
    num_chunks = -(-num_tokens // chunk)
    if num_chunks > 1:
        x, b, c, step = (_chunks_as_rows(t, chunk) for t in (x, b, c, step))
    b, c, step = b.transpose(1, 2), c.transpose(1, 2), step.transpose(1, 2)  # [r, g, t, n] twice, [r, h, t]
    # In float64, because a sum of many decays would lose the small differences that matter.
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
    """Reshapes [r, t, ...] to [r * k, chunk, ...], padded with zeros."""
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
    # Copied row by row here; the product would copy it number by number.
    driven = driven.transpose(1, 2).contiguous()  # [r, g, t, per_group * p]
    ends = torch.matmul(driven.transpose(2, 3), b).view(num_reqs, -1, *ssm_state.shape[1:])  # [r, k, h, p, n]
    carry = torch.exp(whole).to(step.dtype).view(num_reqs, -1, ssm_state.shape[1], 1, 1)
    states = [ssm_state]
    for k in range(num_states):
        states.append(torch.addcmul(ends[:, k], states[-1], carry[:, k]))
    return states[1:]


def _from_state(c: Tensor, log_decay: Tensor, start: Tensor) -> Tensor:
    """Contribution of the state before a chunk [r, h, p, n] to its outputs [r, t, h, p]."""
    rows, groups = c.shape[:2]
    _, heads, head_dim, state_size = start.shape
    read = torch.matmul(c, start.view(rows, groups, -1, state_size).transpose(2, 3))  # [r, g, t, per_group * p]
    read = read.transpose(1, 2).reshape(rows, -1, heads, head_dim)
    return read * torch.exp(log_decay).to(c.dtype).transpose(1, 2)[..., None]


def _from_chunk(x: Tensor, b: Tensor, c: Tensor, step: Tensor, log_decay: Tensor) -> Tensor:
    """Contribution of a chunk's own tokens to its outputs [r, t, h, p]."""
    groups = b.shape[1]
    # [r, h, t, t']: decay from token t' to token t, capped before exp, which would overflow above the diagonal.
    gap = (log_decay[..., :, None] - log_decay[..., None, :]).clamp(max=0.0)
    mixing = torch.exp(gap.to(step.dtype)) * step[..., None, :]
    similarity = torch.matmul(c, b.transpose(2, 3)).tril()
    mixing = (mixing.unflatten(1, (groups, -1)) * similarity[:, :, None]).flatten(1, 2)
    return torch.matmul(mixing, x.transpose(1, 2)).transpose(1, 2)
