"""Norms, modulation and gates in Triton: one program per row, which it reads and writes once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.backend import on_its_device
from twotower_kernels.tuning import settings

OP = "time_modulation"

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Values of `norm_kernel`'s argument ORDER.
NORM, MODULATE_THEN_NORM, NORM_THEN_MODULATE = "norm", "modulate, norm", "norm, modulate"

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


@triton.jit(do_not_specialize=["num_tokens"])
def norm_kernel(
    x,  # [num_rows, HIDDEN], num_rows = num_reqs * num_tokens
    shift,  # [num_reqs, HIDDEN]; None without modulation, as are all that belong to it
    scale_plus_one,  # [num_reqs, HIDDEN]
    weight,  # [HIDDEN]
    out,  # [num_rows, HIDDEN], contiguous
    num_tokens,
    x_stride,
    shift_stride,  # 0 where one row serves all requests
    scale_stride,
    eps,
    ORDER: tl.constexpr,
    NORM_DTYPE: tl.constexpr,  # of what enters the norm and leaves it
    MODULATED_DTYPE: tl.constexpr,  # of the modulation's product and sum
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    # All loads come before the sum over the row, at which all threads wait.
    y = load_wide(x + row * x_stride, channel, HIDDEN)
    w = load_wide(weight, channel, HIDDEN)
    if ORDER != "norm":
        # Divided as int32: a division of int64 numbers is a long subroutine.
        request = (tl.program_id(0) // num_tokens).to(tl.int64)
        added = load_wide(shift + request * shift_stride, channel, HIDDEN)
        factor = load_wide(scale_plus_one + request * scale_stride, channel, HIDDEN)
    if ORDER == "modulate, norm":
        y = rounded(rounded(y * factor, MODULATED_DTYPE) + added, MODULATED_DTYPE)
    y = unit_rms(rounded(y, NORM_DTYPE), eps, HIDDEN) * w
    if ORDER == "norm, modulate":
        y = rounded(rounded(y, NORM_DTYPE) * factor, MODULATED_DTYPE) + added
    tl.store(out + row * HIDDEN + channel, y, mask=channel < HIDDEN)


@triton.jit(do_not_specialize=["num_tokens"])
def gated_residual_kernel(
    residual,  # [num_rows, HIDDEN], num_rows = num_reqs * num_tokens
    x,  # [num_rows, HIDDEN]
    gate,  # [num_reqs, HIDDEN]
    out,  # [num_rows, HIDDEN], contiguous
    num_tokens,
    residual_stride,
    x_stride,
    gate_stride,  # 0 where one row serves all requests
    PRODUCT_DTYPE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    request = (tl.program_id(0) // num_tokens).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    product = load_wide(gate + request * gate_stride, channel, HIDDEN) * load_wide(x + row * x_stride, channel, HIDDEN)
    total = load_wide(residual + row * residual_stride, channel, HIDDEN) + rounded(product, PRODUCT_DTYPE)
    tl.store(out + row * HIDDEN + channel, total, mask=channel < HIDDEN)


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


def as_rows(x: Tensor) -> Tensor:
    """Views [..., width] as [num_rows, width], channels contiguous; copies only where strides allow no such view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def request_rows(modulation: Tensor) -> tuple[Tensor, int]:
    """Rows [num_reqs or 1, hidden], channels contiguous, and the stride from one request's row to the next."""
    rows = as_rows(modulation)
    return rows, rows.stride(0) if len(rows) > 1 else 0


@on_its_device
def launch_norm(
    x: Tensor,
    shift: Tensor | None,
    scale_plus_one: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    order: str,
) -> Tensor:
    """Launches the norm of op.py that `order` names; the plain norm takes the dtype of `x` and no modulation."""
    rows, modulated_dtype, shift_stride, scale_stride = as_rows(x), dtype, 0, 0
    if shift is not None and scale_plus_one is not None:
        modulated_dtype = torch.promote_types(x.dtype if order == MODULATE_THEN_NORM else dtype, shift.dtype)
        (shift, shift_stride), (scale_plus_one, scale_stride) = request_rows(shift), request_rows(scale_plus_one)
    out = torch.empty(x.shape, dtype=modulated_dtype if order == NORM_THEN_MODULATE else dtype, device=x.device)
    norm_kernel[(len(rows),)](
        rows,
        shift,
        scale_plus_one,
        weight.contiguous(),
        out,
        1 if order == NORM else x.shape[1],
        rows.stride(0),
        shift_stride,
        scale_stride,
        eps,
        ORDER=order,
        NORM_DTYPE=TRITON_DTYPES[dtype],
        MODULATED_DTYPE=TRITON_DTYPES[modulated_dtype],
        HIDDEN=rows.shape[1],
        BLOCK=triton.next_power_of_2(rows.shape[1]),
        **settings(OP, "norm"),
        **LAUNCH,
    )
    return out


@on_its_device
def launch_gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Launches `gated_residual` of op.py."""
    residual_rows, x_rows, (gate_rows, gate_stride) = as_rows(residual), as_rows(x), request_rows(gate)
    product_dtype = torch.promote_types(gate.dtype, x.dtype)
    out = torch.empty(x.shape, dtype=torch.promote_types(residual.dtype, product_dtype), device=x.device)
    num_rows, hidden = x_rows.shape
    chosen = settings(OP, "gated_residual")
    gated_residual_kernel[(num_rows, triton.cdiv(hidden, chosen["BLOCK"]))](
        residual_rows,
        x_rows,
        gate_rows,
        out,
        x.shape[1],
        residual_rows.stride(0),
        x_rows.stride(0),
        gate_stride,
        PRODUCT_DTYPE=TRITON_DTYPES[product_dtype],
        HIDDEN=hidden,
        **chosen,
        **LAUNCH,
    )
    return out


@on_its_device
def launch_gated_group_norm(scanned: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    """Launches `gated_group_norm` of op.py."""
    scanned_rows, gate_rows = as_rows(scanned), as_rows(gate)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = gate.shape[-1] // num_groups
    gated_group_norm_kernel[(len(gate_rows), num_groups)](
        scanned_rows,
        gate_rows,
        weight.contiguous(),
        out,
        scanned_rows.stride(0),
        gate_rows.stride(0),
        eps,
        DTYPE=TRITON_DTYPES[gate.dtype],
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        **settings(OP, "gated_group_norm"),
        **LAUNCH,
    )
    return out
