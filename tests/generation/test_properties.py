"""Properties that hold for any batch, any split and any order (hypothesis; float64, so that bounds are tight)."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.builders import random_ids, tiny_model
from tests.support.tolerances import FLOAT64
from twotower_spec import GenerationResult
from twotower_spec.state import ContextState

MODES = ("generate_ar", "generate_mock_ar", "generate_mask_diffusion")
OPTIONS: dict[str, dict[str, Any]] = {
    "generate_mask_diffusion": {"block_size": 5, "steps_per_block": 3, "confidence_threshold": 0.1}
}
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [random_ids(length, seed=i) for i, length in enumerate(lengths)]


def generate(mode: str, prompts: list[list[int]], **options: Any) -> GenerationResult:
    result: GenerationResult = getattr(tiny_model(), mode)(
        prompts, max_new_tokens=12, **OPTIONS.get(mode, {}), **options
    )
    return result


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=12)
@given(lengths=lengths)
def test_ragged_batch_equals_one_by_one(mode: str, temperature: float, lengths: list[int]) -> None:
    prompts = prompts_of(lengths)
    together = generate(mode, prompts, temperature=temperature, seed=9, eos_token_id=[7, 20])
    for row, prompt in enumerate(prompts):
        alone = generate(mode, [prompt], temperature=temperature, seed=9 + row, eos_token_id=[7, 20])
        assert together.token_ids[row] == alone.token_ids[0]
        assert together.num_denoiser_passes[row] == alone.num_denoiser_passes[0]


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=8)
@given(lengths=lengths, order=st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(mode: str, lengths: list[int], order: Any) -> None:
    prompts = prompts_of(lengths)
    shuffled = list(range(len(prompts)))
    order.shuffle(shuffled)
    straight, mixed = generate(mode, prompts), generate(mode, [prompts[i] for i in shuffled])
    assert mixed.token_ids == [straight.token_ids[i] for i in shuffled]


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 150), cuts=st.lists(st.integers(0, 150), max_size=6))
def test_any_split_of_a_prompt_equals_the_whole(length: int, cuts: list[int]) -> None:
    model, ids = tiny_model(), random_ids(length)
    bounds = sorted({0, length, *(min(cut, length) for cut in cuts)})
    whole, split = (ContextState(model.config, 1, 10, model.dtype) for _ in range(2))
    expected = whole.extend(model.context, {0: ids}).logits
    for start, stop in pairwise(bounds):
        logits = split.extend(model.context, {0: ids[start:stop]}).logits
    assert expected is not None and logits is not None
    for actual, wanted in (
        (logits, expected),
        (split.mamba.ssm, whole.mamba.ssm),
        (split.mamba.conv, whole.mamba.conv),
    ):
        torch.testing.assert_close(actual, wanted, atol=FLOAT64, rtol=FLOAT64)


@settings(deadline=None, max_examples=15)
@given(lengths=lengths, budget=st.integers(1, 50))
def test_any_prefill_budget_gives_the_same_logits(lengths: list[int], budget: int) -> None:
    model, rows = tiny_model(), dict(enumerate(prompts_of(lengths)))
    chunked, whole = (ContextState(model.config, len(rows), 20, model.dtype) for _ in range(2))
    actual = chunked.extend_in_chunks(model.context, rows, token_budget=budget)
    expected = whole.extend(model.context, rows).logits
    assert expected is not None
    for row in rows:
        torch.testing.assert_close(actual[row], expected[row], atol=FLOAT64, rtol=FLOAT64)


@settings(deadline=None, max_examples=10)
@given(first=lengths, second=lengths)
def test_slots_reused_after_release_leave_no_trace(first: list[int], second: list[int]) -> None:
    model = tiny_model()
    used, fresh = (ContextState(model.config, 5, 25, model.dtype) for _ in range(2))
    used.extend(model.context, dict(enumerate(prompts_of(first))))
    for row in range(len(first)):
        used.release(row)
    rows = dict(enumerate(prompts_of(second)))
    actual, expected = used.extend(model.context, rows).logits, fresh.extend(model.context, rows).logits
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual, expected, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=5)
@given(chunk_size=st.integers(1, 300))
def test_result_does_not_depend_on_chunk_size(mode: str, chunk_size: int) -> None:
    model = tiny_model()
    config = model.config.replace(unknown_fields={"chunk_size": chunk_size})
    other = type(model)(config, model.dtype)
    other.load_state_dict(model.state_dict())
    prompts = prompts_of([30, 70])
    options = {"max_new_tokens": 8, **OPTIONS.get(mode, {})}
    assert getattr(other, mode)(prompts, **options).token_ids == getattr(model, mode)(prompts, **options).token_ids
