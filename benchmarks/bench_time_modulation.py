"""Norms, modulation and gates beside the PyTorch lines that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import OURS, Case, Systems, one_by_one, side_by_side
from benchmarks.shapes import REAL_SIZE
from twotower_kernels.time_modulation import (
    add_then_norm,
    gated_group_norm,
    modulate_then_norm,
    norm_then_modulate,
    rms_norm,
)

BLOCK_SIZE = 16
DTYPE = torch.bfloat16
HIDDEN, CHANNELS, GROUPS, EPS = REAL_SIZE.hidden_size, REAL_SIZE.d_inner, REAL_SIZE.n_groups, REAL_SIZE.norm_eps

Inputs = tuple[Any, ...]


def cases(device: torch.device) -> list[Case]:
    """Norms and gates of a denoising step, for one request and for a batch."""
    ops: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], Callable[..., Inputs]]] = [
        ("norm", rms_norm, torch_rms_norm, norm_inputs),
        ("norm", modulate_then_norm, torch_modulate_then_norm, modulation_inputs),
        ("norm", norm_then_modulate, torch_norm_then_modulate, modulation_inputs),
        ("norm", add_gated_then_norm, torch_add_gated_then_norm, branch_inputs),
        ("gated_group_norm", gated_group_norm, torch_gated_group_norm, group_inputs),
    ]
    batches = (1, 8, 64) if device.type == "cuda" else (1,)
    return [_case(device, num_reqs, *op) for op in ops for num_reqs in batches]


def _case(
    device: torch.device,
    num_reqs: int,
    kernel: str,
    op: Callable[..., Tensor],
    composition: Callable[..., Tensor],
    inputs: Callable[..., Inputs],
) -> Case:
    width = CHANNELS if op is gated_group_norm else HIDDEN

    def make() -> Systems:
        arguments = inputs(num_reqs, torch.Generator(device).manual_seed(0), device)
        functions = {OURS: op, "torch composition": composition}
        if device.type == "cuda":
            functions |= {"torch.compile": torch.compile(composition, dynamic=False)} | _libraries(op)
        expected = composition(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
        for function in functions.values():
            # Three roundings to 8 bits at most, in the mean over all numbers.
            assert (function(*arguments).double() - expected).norm() < 2**-7 * expected.norm()
        return {name: lambda function=function: function(*arguments) for name, function in functions.items()}

    # Bytes of the narrow arguments: a row of weights, and the modulation's rows of every request.
    rows = {rms_norm: 1, add_gated_then_norm: 1 + 3 * num_reqs, gated_group_norm: 1}.get(op, 1 + 2 * num_reqs)
    tokens = num_reqs * BLOCK_SIZE
    # Bytes per channel: a float32 scan, a gate and the result; stream and branch, sum and norm; or x and the result.
    per_channel = {gated_group_norm: 4 + 2 * DTYPE.itemsize, add_gated_then_norm: 4 * DTYPE.itemsize}.get(
        op, 2 * DTYPE.itemsize
    )
    shape = f"{op.__name__} [{num_reqs}, {BLOCK_SIZE}, {width}] bf16"
    return Case("time_modulation", kernel, shape, width * (tokens * per_channel + rows * DTYPE.itemsize), make)


def norm_inputs(num_reqs: int, generator: torch.Generator, device: torch.device) -> Inputs:
    x = torch.randn(num_reqs, BLOCK_SIZE, HIDDEN, generator=generator, device=device, dtype=DTYPE)
    return x, torch.randn(HIDDEN, generator=generator, device=device, dtype=DTYPE), EPS, DTYPE


def modulation_inputs(num_reqs: int, generator: torch.Generator, device: torch.device) -> Inputs:
    x, weight, eps, dtype = norm_inputs(num_reqs, generator, device)
    # As the denoiser slices it: one of several layers, three rows.
    modulation = torch.randn(num_reqs, 2, 3, HIDDEN, generator=generator, device=device, dtype=DTYPE)
    shift, scale_plus_one, _ = modulation[:, 1].unbind(1)
    return x, shift, scale_plus_one, weight, eps, dtype


def branch_inputs(num_reqs: int, generator: torch.Generator, device: torch.device) -> Inputs:
    residual, gate, *norm = modulation_inputs(num_reqs, generator, device)
    branch = torch.randn(residual.shape, generator=generator, device=device, dtype=DTYPE)
    return residual, branch, gate, gate, *norm


def group_inputs(num_reqs: int, generator: torch.Generator, device: torch.device) -> Inputs:
    widths = [CHANNELS, REAL_SIZE.d_conv_channels + REAL_SIZE.mamba_num_heads]
    projected = torch.randn(num_reqs, BLOCK_SIZE, sum(widths), generator=generator, device=device, dtype=DTYPE)
    gate, _ = projected.split(widths, dim=-1)
    scanned = torch.randn(num_reqs, BLOCK_SIZE, CHANNELS, generator=generator, device=device)
    return scanned, gate, torch.randn(CHANNELS, generator=generator, device=device, dtype=DTYPE), GROUPS, EPS


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def torch_modulate_then_norm(
    x: Tensor, shift: Tensor, scale_plus_one: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return torch_rms_norm(x * scale_plus_one[:, None] + shift[:, None], weight, eps, dtype)


def torch_norm_then_modulate(
    x: Tensor, shift: Tensor, scale_plus_one: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return torch_rms_norm(x, weight, eps, dtype) * scale_plus_one[:, None] + shift[:, None]


def add_gated_then_norm(residual: Tensor, branch: Tensor, gate: Tensor, *norm: Any) -> Tensor:
    """The norm of the sum; the sum is written beside it."""
    return add_then_norm(modulate_then_norm, residual, branch, gate, *norm)[1]


def torch_add_gated_then_norm(residual: Tensor, branch: Tensor, gate: Tensor, *norm: Any) -> Tensor:
    return torch_modulate_then_norm(residual + gate[:, None] * branch, *norm)


def torch_gated_group_norm(scanned: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    wide = scanned.to(gate.dtype).to(scanned.dtype)
    groups = (wide * F.silu(gate.to(wide.dtype))).unflatten(-1, (num_groups, -1))
    normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(wide.dtype)).to(gate.dtype)


def _libraries(op: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """Rivals from other projects, where these are installed."""
    if op is rms_norm:
        return {"torch.nn.functional.rms_norm": lambda x, weight, eps, _dtype: F.rms_norm(x, weight.shape, weight, eps)}
    if op is not gated_group_norm:
        return {}
    try:
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    except ImportError:
        return {}

    def mamba_ssm(scanned: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
        width = gate.shape[-1] // num_groups
        y: Tensor = rmsnorm_fn(
            scanned.to(gate.dtype), weight, None, z=gate, eps=eps, group_size=width, norm_before_gate=False
        )
        return y

    return {"mamba_ssm": mamba_ssm}


@one_by_one(cases(torch.device("cpu")))
def test_time_modulation(benchmark: BenchmarkFixture, case: Case) -> None:
    side_by_side(benchmark, case)
