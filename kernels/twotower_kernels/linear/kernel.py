"""The activation between two products in Triton: numbers are read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.backend import on_its_device
from twotower_kernels.tuning import cdiv, settings

OP = "linear"


@triton.jit
def squared_relu_kernel(
    x,  # [num_rows, WIDTH], contiguous
    out,  # [num_rows, WIDTH], contiguous
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * WIDTH + channel
    exists = channel < WIDTH
    y = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    # A comparison lets NaN pass, as PyTorch's ReLU does.
    y = tl.where(y < 0, 0.0, y)
    tl.store(out + at, y * y, mask=exists)


@on_its_device
def launch_squared_relu(x: Tensor) -> Tensor:
    """Launches `squared_relu` of op.py."""
    x = x.contiguous()
    out, width, chosen = torch.empty_like(x), x.shape[-1], settings(OP, "squared_relu")
    squared_relu_kernel[(x.numel() // width, cdiv(width, chosen["BLOCK"]))](x, out, WIDTH=width, **chosen)
    return out
