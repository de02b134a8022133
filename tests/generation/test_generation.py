"""Ends, cuts, sampling, streams and traces of the three modes."""

from typing import Any

import pytest
import torch
from scipy import stats

from tests.support.builders import random_ids, tiny_model
from twotower_spec import ArgumentError, DiffusionConfig, TwoTowerModel
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state import ContextState

MODES = ("generate_ar", "generate_mock_ar", "generate_mask_diffusion")
PROMPTS = [random_ids(5), random_ids(17, seed=1), random_ids(1, seed=2)]


@pytest.fixture
def model() -> TwoTowerModel:
    return tiny_model()


def small_blocks(mode: str) -> dict[str, Any]:
    return {"block_size": 5, "steps_per_block": 3} if mode == "generate_mask_diffusion" else {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_new_tokens", [0, 1, 4, 5, 11])
def test_every_row_gets_exactly_the_tokens_asked_for(model: TwoTowerModel, mode: str, max_new_tokens: int) -> None:
    long = getattr(model, mode)(PROMPTS, max_new_tokens=15, **small_blocks(mode))
    short = getattr(model, mode)(PROMPTS, max_new_tokens=max_new_tokens, **small_blocks(mode))
    assert short.token_ids == [row[:max_new_tokens] for row in long.token_ids]


@pytest.mark.parametrize("mode", ["generate_ar", "generate_mock_ar"])
def test_row_ends_at_its_own_end_token_and_keeps_it(model: TwoTowerModel, mode: str) -> None:
    free = getattr(model, mode)(PROMPTS, max_new_tokens=20).token_ids
    ends = {free[0][3], free[1][6]}
    stopped = getattr(model, mode)(PROMPTS, max_new_tokens=20, eos_token_id=ends).token_ids
    for row, tokens in enumerate(stopped):
        first = next((i for i, token in enumerate(free[row]) if token in ends), 19)
        assert tokens == free[row][: first + 1]


def test_block_with_an_end_token_is_kept_whole(model: TwoTowerModel) -> None:
    free = model.generate_mask_diffusion(PROMPTS, max_new_tokens=20, **small_blocks("generate_mask_diffusion"))
    end = free.token_ids[0][6]
    stopped = model.generate_mask_diffusion(
        PROMPTS, max_new_tokens=20, eos_token_id=end, **small_blocks("generate_mask_diffusion")
    )
    for row, tokens in enumerate(stopped.token_ids):
        blocks = [free.token_ids[row][i : i + 5] for i in range(0, 20, 5)]
        last = next((i for i, block in enumerate(blocks) if end in block), 3)
        assert tokens == free.token_ids[row][: 5 * (last + 1)]


def test_threshold_zero_takes_one_pass_per_block(model: TwoTowerModel) -> None:
    result = model.generate_mask_diffusion(PROMPTS, max_new_tokens=32, confidence_threshold=0.0)
    assert result.num_denoiser_passes == [2, 2, 2]
    assert result.tokens_per_denoiser_pass == 16


def test_rows_count_their_own_passes(model: TwoTowerModel) -> None:
    prompts = [random_ids(9, seed=seed) for seed in range(6)]
    options = {"max_new_tokens": 24, "block_size": 8, "steps_per_block": 8, "confidence_threshold": 0.15}
    together = model.generate_mask_diffusion(prompts, **options).num_denoiser_passes
    assert together == [model.generate_mask_diffusion([p], **options).num_denoiser_passes[0] for p in prompts]
    assert len(set(together)) > 1


@pytest.mark.parametrize("mode", MODES)
def test_seed_fixes_the_sample(model: TwoTowerModel, mode: str) -> None:
    def run(seed: int) -> list[list[int]]:
        options = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed, **small_blocks(mode)}
        tokens: list[list[int]] = getattr(model, mode)(PROMPTS, **options).token_ids
        return tokens

    assert run(3) == run(3)
    assert run(3) != run(4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_from_one_token_is_greedy(model: TwoTowerModel, mode: str, narrow: dict[str, Any]) -> None:
    options = {"max_new_tokens": 10, **small_blocks(mode)}
    greedy = getattr(model, mode)(PROMPTS, **options).token_ids
    assert getattr(model, mode)(PROMPTS, temperature=2.0, seed=0, **narrow, **options).token_ids == greedy


def test_sampled_tokens_follow_the_softmax(model: TwoTowerModel) -> None:
    # N and bound fixed beforehand: 4000 samples, p > 1e-4; tokens expected less than 5 times are pooled.
    prompt = random_ids(6)
    state = ContextState(model.config, 1, 4, model.dtype)
    logits = state.extend(model.context, {0: prompt}).logits
    assert logits is not None
    expected = torch.softmax(logits[0] / 0.8, -1) * 4000
    tokens = model.generate_ar([prompt] * 4000, max_new_tokens=1, temperature=0.8, seed=11).token_ids
    counts = torch.tensor(tokens).flatten().bincount(minlength=61).double()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-4


def test_top_k_and_top_p_keep_the_published_sets() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    kept = [
        (Sampler(1.0, top_k=2), [True, True, False, False]),
        (Sampler(1.0, top_p=0.5), [True, True, False, False]),
        (Sampler(1.0, top_p=0.35), [True, False, False, False]),
        (Sampler(1.0, top_k=3, top_p=0.99), [True, True, True, False]),
    ]
    for sampler, expected in kept:
        assert sampler.filter(logits).isfinite().tolist() == [expected]
    assert Sampler(1.0, top_k=0, top_p=1.0).filter(logits).equal(logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_torchs_own_generator_is_not_touched(model: TwoTowerModel, mode: str, temperature: float) -> None:
    before = torch.get_rng_state()
    getattr(model, mode)(PROMPTS, max_new_tokens=6, temperature=temperature, **small_blocks(mode))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_stream_yields_every_token_in_order(model: TwoTowerModel, mode: str) -> None:
    expected = getattr(model, f"generate_{mode}")(PROMPTS, max_new_tokens=7)
    rows: list[list[int]] = [[] for _ in PROMPTS]
    for block in getattr(model, f"stream_{mode}")(PROMPTS, max_new_tokens=7):
        assert block.block_index == len(rows[block.row])
        rows[block.row].extend(block.token_ids)
        assert block.finished == (len(rows[block.row]) == 7)
    assert rows == expected.token_ids


def test_stream_of_blocks_yields_before_the_next_block_is_begun(model: TwoTowerModel) -> None:
    config = DiffusionConfig(block_size=4, steps_per_block=2)
    expected = model.generate_mask_diffusion(PROMPTS, max_new_tokens=10, block_size=4, steps_per_block=2)
    stream = model.stream_mask_diffusion(PROMPTS, max_new_tokens=10, config=config, with_traces=True)
    first = next(stream)
    assert first.token_ids == expected.token_ids[0][:4]
    assert first.trace is not None and first.trace.xt[0] == [3, 3, 3, 3] and first.trace.xt[-1] == first.token_ids
    rest = [block for block in stream if block.row == 0]
    assert [*first.token_ids, *rest[0].token_ids, *rest[1].token_ids] == expected.token_ids[0]


def test_step_callback_sees_every_step_and_changes_nothing(model: TwoTowerModel) -> None:
    calls: list[tuple[int, int, int, float, bool]] = []

    def callback(
        step_idx: int, steps_per_block: int, xt: torch.Tensor, *, t: float, logits: torch.Tensor | None, block_idx: int
    ) -> None:
        assert xt.shape == (1, 5)
        assert logits is None or logits.shape == (1, 5, 61)
        calls.append((step_idx, steps_per_block, block_idx, t, logits is None))

    options = {"max_new_tokens": 10, "confidence_threshold": 1.0, "block_size": 5, "steps_per_block": 5}
    result = model.generate_mask_diffusion(PROMPTS[:1], step_callback=callback, **options)
    assert result.token_ids == model.generate_mask_diffusion(PROMPTS[:1], **options).token_ids
    expected = [(0, 5, b, 1.0, True) for b in range(2)] + [
        (s, 5, b, 1 - s / 5, False) for b in range(2) for s in range(5)
    ]
    assert sorted((s, n, b, round(t, 6), first) for s, n, b, t, first in calls) == sorted(
        (s, n, b, round(t, 6), first) for s, n, b, t, first in expected
    )


def test_state_is_read_once_per_block(model: TwoTowerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = ContextState.block_context

    def counting(state: ContextState, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(state, *args, **kwargs)

    monkeypatch.setattr(ContextState, "block_context", counting)
    result = model.generate_mask_diffusion(PROMPTS[:1], max_new_tokens=32, confidence_threshold=1.0)
    assert len(calls) == 2 and result.num_denoiser_passes == [32]


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_runs_in_every_mode(mode: str) -> None:
    model = tiny_model("bfloat16", residual_in_fp32=True)
    tokens = getattr(model, mode)(PROMPTS, max_new_tokens=9, **small_blocks(mode)).token_ids
    assert [len(row) for row in tokens] == [9, 9, 9]


@pytest.mark.parametrize("mode", ["generate_mock_ar", "generate_mask_diffusion"])
def test_towers_may_differ_in_dtype(mode: str) -> None:
    both = tiny_model("float64")
    mixed = TwoTowerModel(both.config, torch.float64, denoiser_dtype=torch.float32)
    mixed.load_state_dict(both.state_dict())
    assert mixed.context.dtype == torch.float64
    assert mixed.denoiser.dtype == torch.float32
    options = {"max_new_tokens": 10, **small_blocks(mode)}
    assert getattr(mixed, mode)(PROMPTS, **options).token_ids == getattr(both, mode)(PROMPTS, **options).token_ids


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["M", "M-*E", "ME*-M"])
def test_any_mix_of_layers_generates_the_same_in_both_precisions(mode: str, pattern: str) -> None:
    options = {"max_new_tokens": 10, **small_blocks(mode)}
    exact = getattr(tiny_model("float64", hybrid_override_pattern=pattern), mode)(PROMPTS, **options).token_ids
    assert getattr(tiny_model("float32", hybrid_override_pattern=pattern), mode)(PROMPTS, **options).token_ids == exact


def test_prompts_come_as_tensor_list_or_rows(model: TwoTowerModel) -> None:
    ids = random_ids(6)
    expected = model.generate_ar([ids], max_new_tokens=3).sequences
    assert model.generate_ar(ids, max_new_tokens=3).sequences == expected
    assert model.generate_ar(torch.tensor([ids]), max_new_tokens=3).sequences == expected
    assert model.generate_ar([torch.tensor(ids)], max_new_tokens=3).to_tensor().tolist() == expected


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt was given"),
        ([[5], []], {}, "prompt 1 is empty"),
        ([[5, 61]], {}, "token id 61 in prompt 0 is outside the vocabulary; allowed are 0 to 60"),
        ([[5, -1]], {}, "token id -1"),
        ([[5]], {"max_new_tokens": -1}, "max_new_tokens -1"),
        ([[5]], {"max_new_tokens": 2.5}, "max_new_tokens 2.5"),
        ([[5]], {"temperature": -1.0}, "temperature -1.0"),
        ([[5]], {"top_p": 0.0}, "top_p 0.0"),
        ([[5]], {"top_k": -2}, "top_k -2"),
        ([[5]], {"eos_token_id": 99}, "eos_token_id 99"),
        ([[5]], {"seed": [1, 2]}, "2 seeds were given for 1 prompts"),
        ([[5]], {"seed": 1 << 64}, "64-bit"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_bad_arguments_are_refused_by_value(
    model: TwoTowerModel, mode: str, prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        getattr(model, mode)(prompts, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size 0"),
        ({"steps_per_block": 0}, "steps_per_block 0"),
        ({"confidence_threshold": 1.5}, "confidence_threshold 1.5"),
        ({"mask_token_id": 61}, "mask_token_id 61 is outside the vocabulary"),
    ],
)
def test_bad_diffusion_settings_are_refused_by_value(
    model: TwoTowerModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        model.generate_mask_diffusion([[5]], **options)
