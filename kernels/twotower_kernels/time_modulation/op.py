"""Norm, modulation and gates. Inside a norm everything is float32 (float64 for float64 inputs), as published."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_kernels.backend import use_triton
from twotower_kernels.experts import ExpertOutputs


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, computed wide.

    Args:
        x: [..., hidden], any strides; the kernel copies it where its rows have no common stride or its channels are not
            contiguous. This holds for every activation below.
        weight: [hidden].
        eps: added to the mean square.
        dtype: of what enters the norm and leaves it.

    Returns:
        [..., hidden] in `dtype`.

    Raises:
        ValueError: shapes do not fit.
    """
    _check_weight(x, weight)
    if _in_triton(x, weight):
        from twotower_kernels.time_modulation.kernel import NORM, launch_norm

        return launch_norm(x, None, None, None, None, weight, eps, dtype, NORM)[1]
    return _rms_norm(x.to(dtype), weight, eps)


def modulate_then_norm(
    x: Tensor, shift: Tensor, scale_plus_one: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Input of a Mamba or attention layer: modulation first, then the norm.

    Args:
        x: [num_reqs, num_tokens, hidden].
        shift, scale_plus_one: [num_reqs, hidden], or [1, hidden] for all alike; of one dtype.
        weight: [hidden].
        eps: added to the mean square.
        dtype: dtype of the mixer's input.

    Returns:
        [num_reqs, num_tokens, hidden] in `dtype`.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check_weight(x, weight)
    _check_modulation(x, shift, scale_plus_one)
    if _in_triton(x, shift, scale_plus_one, weight):
        from twotower_kernels.time_modulation.kernel import MODULATE_THEN_NORM, launch_norm

        return launch_norm(x, None, None, shift, scale_plus_one, weight, eps, dtype, MODULATE_THEN_NORM)[1]
    return _rms_norm(_modulate(x, shift, scale_plus_one).to(dtype), weight, eps)


def norm_then_modulate(
    x: Tensor, shift: Tensor, scale_plus_one: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Input of an expert or MLP layer: the norm first, then the modulation. Arguments as `modulate_then_norm`.

    Returns:
        [num_reqs, num_tokens, hidden] in the wider of `dtype` and the modulation's dtype.
    """
    _check_weight(x, weight)
    _check_modulation(x, shift, scale_plus_one)
    if _in_triton(x, shift, scale_plus_one, weight):
        from twotower_kernels.time_modulation.kernel import NORM_THEN_MODULATE, launch_norm

        return launch_norm(x, None, None, shift, scale_plus_one, weight, eps, dtype, NORM_THEN_MODULATE)[1]
    return _modulate(_rms_norm(x.to(dtype), weight, eps), shift, scale_plus_one)


def add_then_norm(
    norm: Callable[..., Tensor],
    residual: Tensor,
    branch: Tensor | ExpertOutputs,
    gate: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """The residual stream after a layer, and the next layer's input, in one launch.

    Args:
        norm: `rms_norm`, `modulate_then_norm` or `norm_then_modulate`.
        residual: [num_reqs, num_tokens, hidden], the stream before the layer.
        branch: [num_reqs, num_tokens, hidden], the layer's output; or outputs of experts for as many tokens, whose sum
            is the layer's.
        gate: [num_reqs, hidden], or [1, hidden] for all alike, a factor of the branch without `1 +`; None for 1.
        arguments: of `norm`, after the first.

    Returns:
        `residual + gate * branch`, [num_reqs, num_tokens, hidden] in the widest dtype of the three.
        `norm` of it.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check_branch(residual, branch)
    if gate is not None:
        _check_request_rows(residual, gate, "gate")
    *modulation, weight, eps, dtype = arguments
    branches = (branch,) if isinstance(branch, Tensor) else (branch.chosen, branch.weights, branch.shared)
    if _in_triton(residual, *branches, gate, *modulation, weight):
        from twotower_kernels.time_modulation.kernel import launch_norm

        _check_weight(residual, weight)
        if modulation:
            _check_modulation(residual, *modulation)
        shift, scale_plus_one = modulation or (None, None)
        return launch_norm(residual, branch, gate, shift, scale_plus_one, weight, eps, dtype, norm.__name__)
    if isinstance(branch, ExpertOutputs):
        branch = branch.total().view(residual.shape)
    total = residual + (branch if gate is None else gate[:, None] * branch)
    return total, norm(total, *arguments)


def gated_group_norm(scanned: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    """Input of a Mamba-2 layer's output projection: `rms_norm(scanned * silu(gate))` per group of channels.

    Args:
        scanned: [..., channels], the scan's output; rounded to the dtype of `gate` first, as published.
        gate: [..., channels].
        weight: [channels].
        num_groups: divides channels; consecutive channels make a group.
        eps: added to the mean square of a group.

    Returns:
        [..., channels] in the dtype of `gate`; everything in between is wide.

    Raises:
        ValueError: shapes do not fit.

    Source: modeling_nemotron_h.py, MambaRMSNormGated.
    """
    _check_weight(gate, weight)
    if scanned.shape != gate.shape:
        raise ValueError(f"scanned is {tuple(scanned.shape)} and gate {tuple(gate.shape)}; give them one shape")
    if gate.shape[-1] % num_groups:
        raise ValueError(f"num_groups {num_groups} does not divide {gate.shape[-1]} channels; give a divisor")
    if _in_triton(gate, scanned, weight):
        from twotower_kernels.time_modulation.kernel import launch_gated_group_norm

        return launch_gated_group_norm(scanned, gate, weight, num_groups, eps)
    dtype, wide = gate.dtype, _wide(gate.dtype)
    if dtype != wide:
        scanned, gate = scanned.to(dtype).to(wide), gate.to(wide)
    groups = F.silu(gate).mul_(scanned).unflatten(-1, (num_groups, -1))
    normed = F.rms_norm(groups, groups.shape[-1:], eps=eps)
    return normed.mul_(weight.unflatten(0, (num_groups, -1))).flatten(-2).to(dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x.dtype)
    if x.dtype == wide:
        return F.rms_norm(x, weight.shape, weight.to(wide), eps)
    return F.rms_norm(x.to(wide), weight.shape, None, eps).mul_(weight).to(x.dtype)


def _modulate(x: Tensor, shift: Tensor, scale_plus_one: Tensor) -> Tensor:
    # In place: the product is a new tensor, at least as wide as the shift.
    return (x * scale_plus_one[:, None]).add_(shift[:, None])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in_triton(x: Tensor, *others: Tensor | None) -> bool:
    # The kernels sum in float32.
    return use_triton(x, *others) and x.dtype != torch.float64


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)} and the last axis of x {x.shape[-1]}; give them one size")


def _check_branch(residual: Tensor, branch: Tensor | ExpertOutputs) -> None:
    if isinstance(branch, Tensor):
        if residual.shape != branch.shape:
            raise ValueError(
                f"residual is {tuple(residual.shape)} and branch {tuple(branch.shape)}; give them one shape"
            )
    elif (residual.shape[:-1].numel(), residual.shape[-1]) != branch.chosen.shape[::2]:
        raise ValueError(
            f"residual is {tuple(residual.shape)} and outputs of experts {tuple(branch.chosen.shape)}; give them one "
            f"number of tokens and one size"
        )


def _check_modulation(x: Tensor, shift: Tensor, scale_plus_one: Tensor) -> None:
    _check_request_rows(x, shift, "shift")
    if shift.shape != scale_plus_one.shape or shift.dtype != scale_plus_one.dtype:
        raise ValueError(
            f"shift is {tuple(shift.shape)} {shift.dtype} and scale_plus_one {tuple(scale_plus_one.shape)} "
            f"{scale_plus_one.dtype}; give them one shape and dtype"
        )


def _check_request_rows(x: Tensor, modulation: Tensor, name: str) -> None:
    """Refuses a modulation that has neither a row per request nor one for all."""
    num_reqs, _, hidden = x.shape
    num_rows, width = modulation.shape
    if width != hidden or num_rows not in (1, num_reqs):
        raise ValueError(
            f"{name} is {tuple(modulation.shape)} and x {tuple(x.shape)}; give {(num_reqs, hidden)} or {(1, hidden)}"
        )
