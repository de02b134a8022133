"""Products of a few tokens with a weight matrix, in the order of operands that is fastest on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import OURS, Case, Systems, one_by_one, side_by_side
from benchmarks.shapes import REAL_SIZE
from twotower_kernels.linear import linear


def cases(device: torch.device) -> list[Case]:
    """Output projections of a Mamba-2 layer; none on a GPU, where the op is `torch.nn.functional.linear`."""
    return [] if device.type == "cuda" else [_case(num_tokens) for num_tokens in (1, 16)]


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
