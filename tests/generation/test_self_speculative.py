"""Self-verified diffusion writes what the context tower writes alone, in fewer of its passes."""

from __future__ import annotations

import pytest
import torch

from tests.support.builders import random_ids, tiny_model
from twotower_spec import ArgumentError, DiffusionConfig, TwoTowerModel

PROMPTS = [random_ids(7), random_ids(1, seed=1), random_ids(23, seed=2)]
SAMPLING = [{}, {"temperature": 0.9}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1.2, "top_p": 0.8}]


def twin() -> TwoTowerModel:
    """Model whose denoiser is its context tower without time conditioning, so that its drafts are often right."""
    model = TwoTowerModel.from_config(tiny_model(hybrid_override_pattern="MEM-").config, dtype="float64", seed=4)
    model.denoiser.load_state_dict(model.context.state_dict(), strict=False)
    with torch.no_grad():
        time = model.denoiser.time_conditioning
        time.w3.zero_()
        time.b3.zero_()
        time.tables.copy_(torch.tensor([0.0, 0.0, 1.0])[:, None].expand_as(time.tables[0]))
    return model


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize(("block_size", "steps"), [(1, 1), (2, 1), (8, 1), (8, 3), (16, 16)])
def test_text_is_that_of_ar(sampling: dict[str, float], block_size: int, steps: int) -> None:
    expected = tiny_model().generate_ar(PROMPTS, 21, seed=5, **sampling)
    result = tiny_model().generate_self_speculative(
        PROMPTS, 21, seed=5, block_size=block_size, steps_per_block=steps, **sampling
    )
    assert result.token_ids == expected.token_ids


@pytest.mark.parametrize("sampling", SAMPLING)
def test_accepted_drafts_save_context_passes(sampling: dict[str, float]) -> None:
    model = twin()
    expected = model.generate_ar(PROMPTS, 40, seed=5, **sampling)
    result = model.generate_self_speculative(
        PROMPTS, 40, seed=5, steps_per_block=7, confidence_threshold=1.0, **sampling
    )
    assert result.token_ids == expected.token_ids
    assert expected.num_context_passes == [40, 40, 40]
    assert sum(result.num_context_passes) < 0.95 * 120
    assert result.tokens_per_context_pass == 120 / sum(result.num_context_passes)


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 9])
def test_text_is_cut_at_max_new_tokens(max_new_tokens: int) -> None:
    model = twin()
    result = model.generate_self_speculative(PROMPTS, max_new_tokens, block_size=16)
    assert result.token_ids == model.generate_ar(PROMPTS, max_new_tokens).token_ids


def test_an_end_token_inside_a_block_ends_the_row_there() -> None:
    model = twin()
    free = model.generate_ar(PROMPTS, 30).token_ids
    for eos in sorted({text[i] for text in free for i in (0, 5, 29)}):
        expected = model.generate_ar(PROMPTS, 30, eos_token_id=eos)
        result = model.generate_self_speculative(PROMPTS, 30, eos_token_id=eos, steps_per_block=4)
        assert result.token_ids == expected.token_ids


def test_rows_do_not_depend_on_the_batch() -> None:
    together = tiny_model().generate_self_speculative(PROMPTS, 17, temperature=0.8, seed=[1, 2, 3])
    for row in range(3):
        alone = tiny_model().generate_self_speculative([PROMPTS[row]], 17, temperature=0.8, seed=[row + 1])
        assert alone.token_ids == [together.token_ids[row]]


def test_what_is_streamed_is_what_is_returned() -> None:
    rows: list[list[int]] = [[] for _ in PROMPTS]
    for block in tiny_model().stream_self_speculative(PROMPTS, 13, DiffusionConfig(4, 2)):
        rows[block.row] += block.token_ids
    assert rows == tiny_model().generate_ar(PROMPTS, 13).token_ids


def test_a_mask_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ArgumentError, match="mask_token_id 99 is outside the vocabulary"):
        tiny_model().generate_self_speculative([[5]], 3, mask_token_id=99)


def test_a_model_without_denoiser_is_refused() -> None:
    model = TwoTowerModel(tiny_model().config, with_denoiser=False)
    with pytest.raises(ArgumentError, match="has no denoiser"):
        model.generate_self_speculative([[5]], 3)
