"""Norms, modulation and gates in Triton: one program per row, which it reads and writes once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.backend import on_its_device
from twotower_kernels.experts import ExpertOutputs
from twotower_kernels.tuning import next_power_of_2, settings

OP = "time_modulation"

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Values of `norm_kernel`'s argument ORDER: names of the ops.
NORM, MODULATE_THEN_NORM, NORM_THEN_MODULATE = "rms_norm", "modulate_then_norm", "norm_then_modulate"

# PyTorch rounds a product and a sum each; fused, they would be rounded once.
LAUNCH = {"enable_fp_fusion": False}


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Rounds float32 values as storing them in `DTYPE` would."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def load_wide(row, channel, WIDTH: tl.constexpr):
    """Loads one row as float32, zeros beyond its end."""
    return tl.load(row + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def unit_rms(x, eps, WIDTH: tl.constexpr):
    """Computes `x / sqrt(mean(x^2) + eps)` for a row of `WIDTH` float32 numbers, zeros beyond its end."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)


@triton.jit
def sum_of_experts(outputs, weights, shared, row, channel, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    """Weighs and sums the outputs of one token's experts, always in the same order, in the dtype of the weights."""
    total = tl.zeros(channel.shape, weights.dtype.element_ty)
    for slot in tl.static_range(TOP_K):
        weight = tl.load(weights + row * TOP_K + slot)
        total += weight * load_wide(outputs + (row * TOP_K + slot) * WIDTH, channel, WIDTH).to(total.dtype)
    # Through float32: the interpreter converts float64 to no narrower dtype, and PyTorch rounds it so too.
    added = rounded(total.to(tl.float32), outputs.dtype.element_ty)
    if shared is not None:
        added = rounded(added + load_wide(shared + row * WIDTH, channel, WIDTH), outputs.dtype.element_ty)
    return added


@triton.jit(do_not_specialize=["num_tokens"])
def norm_kernel(
    x,  # [num_rows, HIDDEN], num_rows = num_reqs * num_tokens
    branch,  # [num_rows, HIDDEN], added to x before the norm; with TOP_K [num_rows, TOP_K, HIDDEN]; None adds nothing
    expert_weights,  # [num_rows, TOP_K], of the branch's rows; None without TOP_K, as is the next
    shared,  # [num_rows, HIDDEN], added to their sum; or None
    gate,  # [num_reqs, HIDDEN], factor of the branch; None for 1
    total,  # [num_rows, HIDDEN], contiguous: x + gate * branch; None without a branch
    shift,  # [num_reqs, HIDDEN]; None without modulation, as is the next
    scale_plus_one,  # [num_reqs, HIDDEN]
    weight,  # [HIDDEN]
    out,  # [num_rows, HIDDEN], contiguous
    num_tokens,
    x_stride,
    branch_stride,
    gate_stride,  # 0 where one row serves all requests, as the next two
    shift_stride,
    scale_stride,
    eps,
    ORDER: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,  # of gate * branch
    NORM_DTYPE: tl.constexpr,  # of what enters the norm and leaves it
    MODULATED_DTYPE: tl.constexpr,  # of the modulation's product and sum
    TOP_K: tl.constexpr,  # rows of the branch that are summed for one; 0 for one as it is
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # Divided as int32: a division of int64 numbers is a long subroutine.
    request = (tl.program_id(0) // num_tokens).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    # All loads come before the sum over the row, at which all threads wait.
    y = load_wide(x + row * x_stride, channel, HIDDEN)
    if branch is not None:
        if TOP_K:
            added = sum_of_experts(branch, expert_weights, shared, row, channel, TOP_K, HIDDEN)
        else:
            added = load_wide(branch + row * branch_stride, channel, HIDDEN)
        if gate is not None:
            added = rounded(load_wide(gate + request * gate_stride, channel, HIDDEN) * added, PRODUCT_DTYPE)
        y = rounded(y + added, total.dtype.element_ty)
        tl.store(total + row * HIDDEN + channel, y, mask=channel < HIDDEN)
    w = load_wide(weight, channel, HIDDEN)
    if ORDER != "rms_norm":
        moved = load_wide(shift + request * shift_stride, channel, HIDDEN)
        factor = load_wide(scale_plus_one + request * scale_stride, channel, HIDDEN)
    if ORDER == "modulate_then_norm":
        y = rounded(rounded(y * factor, MODULATED_DTYPE) + moved, MODULATED_DTYPE)
    y = unit_rms(rounded(y, NORM_DTYPE), eps, HIDDEN) * w
    if ORDER == "norm_then_modulate":
        y = rounded(rounded(y, NORM_DTYPE) * factor, MODULATED_DTYPE) + moved
    tl.store(out + row * HIDDEN + channel, y, mask=channel < HIDDEN)


@triton.jit
def gated_group_norm_kernel(
    scanned,  # [num_rows, num_groups * WIDTH]
    gate,  # [num_rows, num_groups * WIDTH]
    weight,  # [num_groups * WIDTH]
    out,  # [num_rows, num_groups * WIDTH], contiguous
    scanned_stride,
    gate_stride,
    eps,
    DTYPE: tl.constexpr,  # of gate and out
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    first = group * WIDTH
    y = rounded(load_wide(scanned + row * scanned_stride + first, channel, WIDTH), DTYPE)
    z = load_wide(gate + row * gate_stride + first, channel, WIDTH)
    w = load_wide(weight + first, channel, WIDTH)
    y = unit_rms(y * (z / (1 + tl.exp(-z))), eps, WIDTH) * w
    tl.store(out + (row * tl.num_programs(1) + group) * WIDTH + channel, y, mask=channel < WIDTH)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """Rows of [..., width], channels contiguous, and the stride from one to the next.

    Copies only where strides allow no such view.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def request_rows(modulation: Tensor | None) -> tuple[Tensor | None, int]:
    """Rows [num_reqs or 1, hidden], channels contiguous, and the stride from one request's row to the next."""
    if modulation is None:
        return None, 0
    rows = modulation if modulation.stride(1) == 1 else modulation.contiguous()
    return rows, rows.stride(0) if rows.shape[0] > 1 else 0


def empty_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of the shape of `x`."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@on_its_device
def launch_norm(
    x: Tensor,
    branch: Tensor | ExpertOutputs | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale_plus_one: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    order: str,
) -> tuple[Tensor, Tensor]:
    """Launches the norm of op.py that `order` names, of `x + gate * branch` where there is a branch.

    Returns:
        The sum, or `x` itself without a branch, and its norm.
    """
    rows, x_stride = as_rows(x)
    total, branch_rows, branch_stride, product_dtype = None, None, 0, dtype
    expert_weights, shared, top_k = None, None, 0
    if isinstance(branch, ExpertOutputs):
        branch_rows, expert_weights, shared = branch.chosen, branch.weights.contiguous(), branch.shared
        top_k = expert_weights.shape[1]
    elif branch is not None:
        branch_rows, branch_stride = as_rows(branch)
    if branch_rows is not None:
        product_dtype = branch_rows.dtype if gate is None else torch.promote_types(gate.dtype, branch_rows.dtype)
        total = empty_rows(x, torch.promote_types(x.dtype, product_dtype))
    modulated_dtype, stream_dtype = dtype, x.dtype if total is None else total.dtype
    if shift is not None:
        modulated_dtype = torch.promote_types(stream_dtype if order == MODULATE_THEN_NORM else dtype, shift.dtype)
    out = empty_rows(x, modulated_dtype if order == NORM_THEN_MODULATE else dtype)
    (gate, gate_stride), (shift, shift_stride) = request_rows(gate), request_rows(shift)
    scale_plus_one, scale_stride = request_rows(scale_plus_one)
    hidden = x.shape[-1]
    norm_kernel[(x.numel() // hidden,)](
        rows,
        branch_rows,
        expert_weights,
        shared,
        gate,
        total,
        shift,
        scale_plus_one,
        weight.contiguous(),
        out,
        x.shape[1] if x.dim() == 3 else 1,
        x_stride,
        branch_stride,
        gate_stride,
        shift_stride,
        scale_stride,
        eps,
        ORDER=order,
        PRODUCT_DTYPE=TRITON_DTYPES[product_dtype],
        NORM_DTYPE=TRITON_DTYPES[dtype],
        MODULATED_DTYPE=TRITON_DTYPES[modulated_dtype],
        TOP_K=top_k,
        HIDDEN=hidden,
        BLOCK=next_power_of_2(hidden),
        **settings(OP, "norm"),
        **LAUNCH,
    )
    return x if total is None else total, out


@on_its_device
def launch_gated_group_norm(scanned: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    """Launches `gated_group_norm` of op.py."""
    (scanned_rows, scanned_stride), (gate_rows, gate_stride) = as_rows(scanned), as_rows(gate)
    out = empty_rows(gate, gate.dtype)
    channels = gate.shape[-1]
    width = channels // num_groups
    gated_group_norm_kernel[(gate.numel() // channels, num_groups)](
        scanned_rows,
        gate_rows,
        weight.contiguous(),
        out,
        scanned_stride,
        gate_stride,
        eps,
        DTYPE=TRITON_DTYPES[gate.dtype],
        WIDTH=width,
        BLOCK=next_power_of_2(width),
        **settings(OP, "gated_group_norm"),
        **LAUNCH,
    )
    return out
