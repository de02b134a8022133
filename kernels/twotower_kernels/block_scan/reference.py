"""The Mamba-2 recurrence, one token after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_kernels.block_scan.types import ScanWeights


def block_scan_reference(
    u: Tensor,
    delta: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    query_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes what `block_scan` does, as written in the paper. Same arguments and results."""
    num_reqs, num_tokens, _ = u.shape
    heads, head_dim, state_size = ssm_state.shape[1:]
    groups, taps = weights.num_groups, weights.conv_weight.shape[1]
    d_inner = heads * head_dim
    lens = query_lens.tolist() if query_lens is not None else [num_tokens] * num_reqs
    acc = ssm_state.dtype
    output = ssm_state.new_zeros(num_reqs, num_tokens, d_inner)
    new_conv, new_ssm = conv_state.clone(), ssm_state.clone()
    decay_rate = -torch.exp(weights.a_log.to(acc))
    for row, length in enumerate(lens):
        history, state = conv_state[row], ssm_state[row]
        for token in range(length):
            history = torch.cat([history, u[row, token : token + 1]])
            mixed = (history.T.to(acc) * weights.conv_weight.to(acc)).sum(-1)
            if weights.conv_bias is not None:
                mixed = mixed + weights.conv_bias.to(acc)
            mixed = F.silu(mixed).to(u.dtype).to(acc)
            history = history[history.shape[0] - taps + 1 :]
            x = mixed[:d_inner].view(heads, head_dim)
            b, c = mixed[d_inner:].view(2, groups, state_size).repeat_interleave(heads // groups, dim=1)
            step = F.softplus(delta[row, token].to(acc) + weights.dt_bias.to(acc))
            decay = torch.exp(step * decay_rate)
            state = decay[:, None, None] * state + (step[:, None] * x)[:, :, None] * b[:, None, :]
            y = (state * c[:, None, :]).sum(-1) + weights.d.to(acc)[:, None] * x
            output[row, token] = y.flatten()
        new_conv[row], new_ssm[row] = history, state
    return output, new_conv, new_ssm
