"""Every mode against the same loop written out on the plain towers, over odd geometries."""

from typing import Any

import pytest

from tests.support.builders import random_ids, tiny_model
from tests.support.plain_generation import Noise, plain_ar, plain_mask_diffusion, plain_mock_ar

GEOMETRIES: dict[str, dict[str, Any]] = {
    "every kind of layer": {},
    "residual in float32": {"residual_in_fp32": True},
    "weights of experts not normalised": {"norm_topk_prob": False},
    "one tap": {"conv_kernel": 1},
    "two taps": {"conv_kernel": 2},
    "three taps": {"conv_kernel": 3},
    "five taps": {"conv_kernel": 5},
    "experts in groups": {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 5},
    "no attention": {"hybrid_override_pattern": "ME-"},
    "no Mamba": {"hybrid_override_pattern": "*E-"},
    "dense MLP alone between": {"hybrid_override_pattern": "M-*-"},
}
# Without Mamba all masked positions look the same, and rounding would decide which is committed first.
ORDERED = {name: changes for name, changes in GEOMETRIES.items() if name != "no Mamba"}
every_geometry = pytest.mark.parametrize("changes", GEOMETRIES.values(), ids=GEOMETRIES.keys())
both_precisions = pytest.mark.parametrize("dtype", ["float64", "float32"])
# One token, fewer than the taps of a convolution, and more than two pages.
PROMPTS = [random_ids(1, seed=2), random_ids(3), random_ids(37, seed=1)]


@every_geometry
@both_precisions
def test_autoregressive_tokens_are_those_of_the_plain_loop(changes: dict[str, Any], dtype: str) -> None:
    expected = [plain_ar(tiny_model(**changes), prompt, 6) for prompt in PROMPTS]
    assert tiny_model(dtype, **changes).generate_ar(PROMPTS, max_new_tokens=6).token_ids == expected


@every_geometry
@both_precisions
def test_mock_ar_tokens_are_those_of_the_plain_loop(changes: dict[str, Any], dtype: str) -> None:
    expected = [plain_mock_ar(tiny_model(**changes), prompt, 6) for prompt in PROMPTS]
    assert tiny_model(dtype, **changes).generate_mock_ar(PROMPTS, max_new_tokens=6).token_ids == expected


@pytest.mark.parametrize("changes", ORDERED.values(), ids=ORDERED.keys())
@both_precisions
def test_blocks_and_their_traces_are_those_of_the_plain_loop(changes: dict[str, Any], dtype: str) -> None:
    expected = [plain_mask_diffusion(tiny_model(**changes), prompt, 2, 5, 3, 0.1) for prompt in PROMPTS]
    result = tiny_model(dtype, **changes).generate_mask_diffusion(
        PROMPTS, max_new_tokens=10, block_size=5, steps_per_block=3, confidence_threshold=0.1, return_traces=True
    )
    assert result.token_ids == [row.token_ids for row in expected]
    assert result.traces is not None
    assert [[trace.xt for trace in row] for row in result.traces] == [row.xt for row in expected]
    assert [[trace.t for trace in row] for row in result.traces] == [row.t for row in expected]
    assert result.num_denoiser_passes == [sum(map(len, row.t)) for row in expected]


@pytest.mark.parametrize(("block_size", "steps"), [(1, 1), (3, 1), (4, 9), (7, 7), (16, 16)])
@pytest.mark.parametrize("threshold", [0.0, 0.15, 1.0])
def test_any_schedule_commits_what_the_plain_loop_commits(block_size: int, steps: int, threshold: float) -> None:
    model, prompt = tiny_model(), random_ids(6)
    expected = plain_mask_diffusion(model, prompt, 1, block_size, steps, threshold)
    result = model.generate_mask_diffusion(
        [prompt],
        max_new_tokens=block_size,
        block_size=block_size,
        steps_per_block=steps,
        confidence_threshold=threshold,
        return_traces=True,
    )
    assert result.traces is not None and result.traces[0][0].xt == expected.xt[0]


def test_positions_that_nothing_tells_apart_are_committed_alike() -> None:
    model = tiny_model(**GEOMETRIES["no Mamba"])
    options = {"block_size": 5, "steps_per_block": 3, "confidence_threshold": 0.0}
    expected = [plain_mask_diffusion(model, prompt, 2, 5, 3, 0.0).token_ids for prompt in PROMPTS]
    tokens = model.generate_mask_diffusion(PROMPTS, max_new_tokens=10, **options).token_ids
    assert tokens == expected
    assert all(len(set(row[:5])) == 1 for row in tokens)


@pytest.mark.parametrize("seed", [0, -3, 2**62 + 5])
def test_samples_are_those_of_the_plain_loops(seed: int) -> None:
    model, noise = tiny_model(), Noise(temperature=1.2, seed=seed)
    options = {"temperature": 1.2, "seed": [seed] * len(PROMPTS), "max_new_tokens": 6}
    assert model.generate_ar(PROMPTS, **options).token_ids == [plain_ar(model, p, 6, noise) for p in PROMPTS]
    assert model.generate_mock_ar(PROMPTS, **options).token_ids == [plain_mock_ar(model, p, 6, noise) for p in PROMPTS]


@pytest.mark.parametrize("seed", [0, -3, 2**62 + 5])
@pytest.mark.parametrize("steps", [1, 3])
def test_sampled_blocks_draw_anew_at_every_position_and_step(seed: int, steps: int) -> None:
    model = tiny_model()
    expected = [plain_mask_diffusion(model, p, 2, 5, steps, 0.1, Noise(temperature=1.2, seed=seed)) for p in PROMPTS]
    result = model.generate_mask_diffusion(
        PROMPTS,
        max_new_tokens=10,
        block_size=5,
        steps_per_block=steps,
        confidence_threshold=0.1,
        temperature=1.2,
        seed=[seed] * len(PROMPTS),
        return_traces=True,
    )
    assert result.traces is not None
    assert [[trace.xt for trace in row] for row in result.traces] == [row.xt for row in expected]
