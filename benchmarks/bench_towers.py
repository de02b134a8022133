"""One context extension and one denoiser step of the mid-size model, beside a copy of the bytes they read."""

from __future__ import annotations

import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.shapes import MID_SIZE, PROMPT_LENGTH, weight_bytes_of_pass
from twotower_spec import TwoTowerModel
from twotower_spec.state import ContextState


def prompt() -> list[int]:
    return torch.randint(6, MID_SIZE.vocab_size, (PROMPT_LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_seconds(num_bytes: float, device: torch.device) -> float:
    """Median time of copying that many bytes once, now."""
    source = torch.ones(int(num_bytes), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        wait_for(device)
        start = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[2]


def record_against_copy(benchmark: BenchmarkFixture, num_bytes: float, device: torch.device) -> None:
    """Notes the pass's time as a multiple of a copy of the weights it reads; below 1 it is faster than the copy."""
    copy_s = copy_seconds(num_bytes, device)
    benchmark.extra_info |= {
        "weight_mbytes": round(num_bytes / 1e6, 1),
        "copy_ms": round(copy_s * 1e3, 2),
        "time_over_copy": round(benchmark.stats.stats.median / copy_s, 2),
    }


@pytest.mark.parametrize("num_tokens", [1, 16, 17])
def test_context_extension(benchmark: BenchmarkFixture, model: TwoTowerModel, num_tokens: int) -> None:
    benchmark.group = f"context extension, {model.dtype}, {model.context.device}"
    device = model.context.device
    state = ContextState(MID_SIZE, 1, 16, model.dtype, device)
    state.extend(model.context, {0: prompt()})

    def extend() -> None:
        # Provisional: the state stays where it is, so that every round does the same work.
        state.extend(model.context, {0: list(range(6, 6 + num_tokens))}, provisional=True)
        wait_for(device)

    benchmark.pedantic(extend, rounds=20, warmup_rounds=3)
    record_against_copy(benchmark, weight_bytes_of_pass(MID_SIZE, num_tokens, True, model.dtype.itemsize), device)


@pytest.mark.parametrize("num_reqs", [1, 8])
def test_denoiser_step(benchmark: BenchmarkFixture, model: TwoTowerModel, num_reqs: int) -> None:
    benchmark.group = f"denoiser step, 16 positions, {model.dtype}, {model.context.device}"
    device = model.context.device
    state = ContextState(MID_SIZE, num_reqs, 8 * num_reqs, model.dtype, device)
    state.extend(model.context, {row: prompt() for row in range(num_reqs)})
    context = state.block_context(list(range(num_reqs)), 16)
    block = model.denoiser.initial_block(num_reqs, 16, MID_SIZE.mask_token_id)
    with torch.inference_mode():
        modulation = model.denoiser.time_conditioning.for_block_size(16)[[16] * num_reqs]

        def step() -> None:
            model.denoiser(block, context, modulation)
            wait_for(device)

        benchmark.pedantic(step, rounds=20, warmup_rounds=3)
    record_against_copy(benchmark, weight_bytes_of_pass(MID_SIZE, 16 * num_reqs, True, model.dtype.itemsize), device)
