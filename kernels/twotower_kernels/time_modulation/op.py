"""Norm and modulation. Inside a norm everything is float32 (float64 for float64 inputs), as published."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, computed wide, in the dtype of `x`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype == wide:
        return F.rms_norm(x, weight.shape, weight.to(wide), eps)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def modulate_then_norm(
    x: Tensor, shift: Tensor, scale_plus_one: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Input of a Mamba or attention layer: modulation first, then the norm.

    Args:
        x: [num_reqs, num_tokens, hidden].
        shift, scale_plus_one: [num_reqs, hidden].
        weight: [hidden].
        dtype: dtype of the mixer's input.
    """
    return rms_norm((x * scale_plus_one[:, None] + shift[:, None]).to(dtype), weight, eps)


def norm_then_modulate(
    x: Tensor, shift: Tensor, scale_plus_one: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Input of an expert or MLP layer: the norm first, then the modulation. Arguments as `modulate_then_norm`."""
    return rms_norm(x.to(dtype), weight, eps) * scale_plus_one[:, None] + shift[:, None]


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """`residual + gate * x` with one gate row [num_reqs, hidden] per request; the gate has no `1 +`."""
    return residual + gate[:, None] * x
