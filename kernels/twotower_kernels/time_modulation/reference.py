"""Norm and modulation from their definitions."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` computes. Same arguments and result."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def modulate_reference(x: Tensor, shift: Tensor, scale_plus_one: Tensor) -> Tensor:
    """`x * (1 + scale) + shift`, one row of [num_reqs, hidden] per request."""
    return x * scale_plus_one[:, None] + shift[:, None]
