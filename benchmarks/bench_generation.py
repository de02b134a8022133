"""The three modes on the mid-size model, batch 1 and 8, prefill included."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.shapes import MID_SIZE, NEW_TOKENS, PROMPT_LENGTH
from twotower_spec import GenerationResult, TwoTowerModel


@pytest.mark.parametrize("num_reqs", [1, 8])
@pytest.mark.parametrize("mode", ["ar", "mock_ar", "mask_diffusion"])
def test_generation(benchmark: BenchmarkFixture, model: TwoTowerModel, mode: str, num_reqs: int) -> None:
    benchmark.group = f"generate {NEW_TOKENS} tokens, {model.dtype}, {model.context.device}"
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(6, MID_SIZE.vocab_size, (num_reqs, PROMPT_LENGTH), generator=generator)
    generate = getattr(model, f"generate_{mode}")

    def run() -> GenerationResult:
        return generate(prompts, max_new_tokens=NEW_TOKENS)

    result = benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info |= {
        "tokens_per_s": round(result.num_new_tokens / benchmark.stats.stats.median, 1),
        "denoiser_passes_per_row": result.num_denoiser_passes[0],
        "prefill_s": round(result.times.prefill_s, 4),
        "denoise_s": round(result.times.denoise_s, 4),
        "extend_s": round(result.times.extend_s, 4),
    }
