"""Sampling with counter-based noise: one token of the vocabulary for every row of logits."""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import OURS, Case, Systems, one_by_one, side_by_side
from benchmarks.shapes import MID_SIZE, REAL_SIZE
from twotower_kernels.noise import gumbel_argmax, gumbel_noise


def cases(device: torch.device) -> list[Case]:
    """Blocks of 16 positions over the released model's vocabulary: of 1 to 64 requests on a GPU, else of one."""
    if device.type == "cuda":
        return [_case(device, 16 * num_reqs, REAL_SIZE.vocab_size, torch.bfloat16) for num_reqs in (1, 8, 64)]
    return [_case(device, 16, MID_SIZE.vocab_size, torch.float32)]


def _case(device: torch.device, num_rows: int, vocab_size: int, dtype: torch.dtype) -> Case:
    def make() -> Systems:
        generator = torch.Generator(device).manual_seed(0)
        scores = (3 * torch.randn(num_rows, vocab_size, device=device, generator=generator)).to(dtype)
        positions = torch.arange(num_rows, device=device)
        seeds = positions * 0x5DEECE66D

        def composition() -> Tensor:
            return (scores + gumbel_noise(seeds, positions, 1, vocab_size)).argmax(-1)

        def race_of_exponentials() -> Tensor:
            weights = scores.softmax(-1, dtype=torch.float32)
            return weights.div_(torch.empty_like(weights).exponential_(generator=generator)).argmax(-1)

        assert torch.equal(gumbel_argmax(scores, seeds, positions, 1), composition())
        # The last one, which is how vLLM samples, agrees in distribution only: its numbers depend on the batch.
        return {
            OURS: lambda: gumbel_argmax(scores, seeds, positions, 1),
            "torch composition": composition,
            "torch's generator": race_of_exponentials,
        }

    moved = num_rows * (vocab_size * dtype.itemsize + 24)
    return Case("noise", "gumbel_argmax", f"[{num_rows}, {vocab_size}] {dtype}".replace("torch.", ""), moved, make)


@one_by_one(cases(torch.device("cpu")))
def test_noise(benchmark: BenchmarkFixture, case: Case) -> None:
    side_by_side(benchmark, case)
