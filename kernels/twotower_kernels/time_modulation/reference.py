"""Norm and modulation from their definitions."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes what `rms_norm` does. Same arguments and result."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def modulate_reference(x: Tensor, shift: Tensor, scale_plus_one: Tensor) -> Tensor:
    """`x * (1 + scale) + shift`, one row of [num_reqs, hidden] per request."""
    return x * scale_plus_one[:, None] + shift[:, None]


def gated_group_norm_reference(scanned: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    """Computes what `gated_group_norm` does, group by group. Same arguments and result."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    y, z = scanned.to(gate.dtype).to(wide), gate.to(wide)
    gated = y * z * torch.sigmoid(z)
    width = gate.shape[-1] // num_groups
    normed = [
        rms_norm_reference(gated[..., first : first + width], weight[first : first + width], eps)
        for first in range(0, gate.shape[-1], width)
    ]
    return torch.cat(normed, dim=-1).to(gate.dtype)
