"""Products of a few tokens with a weight matrix, in the order of operands that is fastest on a CPU; squared ReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import OURS, Case, Systems, one_by_one, side_by_side
from benchmarks.shapes import REAL_SIZE
from twotower_kernels.linear import linear, squared_relu

BLOCK_SIZE = 16


def cases(device: torch.device) -> list[Case]:
    """Output projections of a Mamba-2 layer, but on a CPU alone: on a GPU these are `torch.nn.functional.linear`.

    The activation of the shared expert, for one request and for a batch.
    """
    if device.type == "cuda":
        return [_activation(device, num_reqs) for num_reqs in (1, 8, 64)]
    return [*(_case(num_tokens) for num_tokens in (1, 16)), _activation(device, 1)]


def _activation(device: torch.device, num_reqs: int) -> Case:
    width = REAL_SIZE.moe_shared_expert_intermediate_size

    def make() -> Systems:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(num_reqs, BLOCK_SIZE, width, generator=generator, device=device, dtype=torch.bfloat16)
        assert torch.equal(squared_relu(x), x.relu().square())
        return {OURS: lambda: squared_relu(x), "torch composition": lambda: x.relu().square()}

    moved = 2 * 2 * num_reqs * BLOCK_SIZE * width
    return Case("linear", "squared_relu", f"squared_relu [{num_reqs}, {BLOCK_SIZE}, {width}] bf16", moved, make)


def _case(num_tokens: int) -> Case:
    wide, narrow = REAL_SIZE.d_inner, REAL_SIZE.hidden_size

    def make() -> Systems:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(num_tokens, wide, generator=generator).bfloat16()
        weight = (torch.randn(narrow, wide, generator=generator) / wide**0.5).bfloat16()
        # Both round float32 sums to bfloat16, each summed in an order of its own.
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=2e-2, atol=2e-2)
        return {OURS: lambda: linear(x, weight), "torch composition": lambda: F.linear(x, weight)}

    moved = 2 * (narrow * wide + num_tokens * (narrow + wide))
    return Case("linear", "", f"[{num_tokens}, {wide}] by [{narrow}, {wide}] bf16", moved, make)


@one_by_one(cases(torch.device("cpu")))
def test_linear(benchmark: BenchmarkFixture, case: Case) -> None:
    side_by_side(benchmark, case)
