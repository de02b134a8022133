"""The acceptance walk, and its drafters against plain loops."""

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.builders import random_ids, tiny_model
from twotower_spec.drafting import FixedPolicy, ThresholdPolicy
from twotower_spec.generation.sampling import Sampler
from twotower_spec.generation.self_speculative import agreeing
from twotower_spec.training.language_models import build_language_model
from twotower_spec.training.quality import (
    ContextTowerDrafter,
    ModelDrafter,
    NgramDrafter,
    TowerDrafter,
    VerifierText,
    measure_acceptance,
    repeated_4gram_fraction,
    write_texts,
)
from twotower_spec.training.recipe import LanguageModelConfig
from twotower_spec.training.sampling import continue_prompts
from twotower_spec.training.tokenizer import train_tokenizer

TEXTS = [VerifierText(random_ids(n, n), random_ids(m, n + m)) for n, m in ((5, 30), (9, 17), (2, 41), (4, 1))]


class Oracle:
    """Drafter that knows the texts, and gets every `wrong`-th token wrong."""

    num_denoiser_passes = 0

    def __init__(self, texts: list[VerifierText], wrong: int) -> None:
        self.texts, self.wrong = texts, wrong

    def draft(self, rows: dict[int, list[int]], num_tokens: int) -> dict[int, list[int]]:
        drafts = {}
        for row, tokens in rows.items():
            assert tokens == self.texts[row].token_ids[: len(tokens)]
            following = self.texts[row].token_ids[len(tokens) : len(tokens) + num_tokens]
            drafts[row] = [-1 if (len(tokens) + i) % self.wrong == 0 else t for i, t in enumerate(following)]
        return drafts


@pytest.fixture(scope="module")
def language_model() -> PreTrainedModel:
    tokenizer = train_tokenizer(["a b c"], vocab_size=270)
    return build_language_model(LanguageModelConfig(32, 64, 2, 2, 1, 16), 61, tokenizer, seed=2).eval()


@pytest.mark.parametrize(("drafts", "text", "count"), [([1, 2], [1, 2, 3], 2), ([1, 9], [1, 2], 1), ([], [1], 0)])
def test_agreement_counts_from_the_left(drafts: list[int], text: list[int], count: int) -> None:
    assert agreeing(drafts, text) == count


def test_a_walk_counts_every_token_once_and_skips_texts_of_one_token() -> None:
    result = measure_acceptance(Oracle(TEXTS, wrong=10**9), TEXTS, num_tokens=4)
    assert result.tokens == [29, 16, 40]
    assert result.verify_steps == [6, 4, 8]  # five tokens a step
    assert result.length == pytest.approx(85 / 18)


def test_a_walk_goes_on_behind_a_wrong_draft() -> None:
    text = [VerifierText([1], list(range(1, 61)))]
    result = measure_acceptance(Oracle(text, wrong=3), text, num_tokens=7)
    # Position 2 on: drafts at 3, 6, 9 .. are wrong; the verifier gives those, three tokens a step after the first.
    assert result.length == pytest.approx(59 / 20)
    assert result.by_position[0] == pytest.approx(1.0) and result.by_position[2] == 0


def test_the_interval_holds_the_length_and_shrinks_to_it_for_one_text() -> None:
    result = measure_acceptance(Oracle(TEXTS, wrong=5), TEXTS, num_tokens=6)
    low, high = result.interval()
    assert low <= result.length <= high and low < high
    alone = measure_acceptance(Oracle(TEXTS[:1], wrong=5), TEXTS[:1], num_tokens=6)
    assert alone.interval() == (alone.length, alone.length)


def test_the_context_tower_drafts_its_own_greedy_text() -> None:
    model = tiny_model()
    prompts = [text.prompt for text in TEXTS[:3]]
    written = model.generate_ar(prompts, max_new_tokens=12).token_ids
    texts = [VerifierText(prompt, text) for prompt, text in zip(prompts, written, strict=True)]
    result = measure_acceptance(ContextTowerDrafter(model, len(texts), 32), texts, num_tokens=5)
    assert result.by_position[0] == 1.0
    assert result.verify_steps == [2, 2, 2]  # eleven tokens, six a step


@pytest.mark.parametrize(("steps", "gamma"), [(1, 0.8), (3, 0.05)])
def test_the_denoiser_drafts_the_block_that_generation_commits(steps: int, gamma: float) -> None:
    model = tiny_model()
    prompts = [text.prompt for text in TEXTS[:3]]
    options = {"block_size": 6, "steps_per_block": steps, "confidence_threshold": gamma}
    expected = model.generate_mask_diffusion(prompts, 6, **options)
    drafter = TowerDrafter(model, 3, 32, ThresholdPolicy(6, steps, gamma), "denoiser")
    assert list(drafter.draft(dict(enumerate(prompts)), 6).values()) == expected.token_ids
    assert drafter.num_denoiser_passes == sum(expected.num_denoiser_passes)


def test_the_first_token_can_come_from_the_context_tower() -> None:
    model = tiny_model()
    prompts = [text.prompt for text in TEXTS[:3]]
    drafter = TowerDrafter(model, 3, 32, FixedPolicy(6, 1), "context")
    blocks = drafter.draft(dict(enumerate(prompts)), 4)
    assert [block[0] for block in blocks.values()] == [t[0] for t in model.generate_ar(prompts, 1).token_ids]
    assert all(len(block) == 4 and model.config.mask_token_id not in block for block in blocks.values())


def test_rows_may_leave_and_rows_keep_their_state() -> None:
    model = tiny_model()
    rows = {i: text.prompt for i, text in enumerate(TEXTS)}
    together = ContextTowerDrafter(model, 4, 64)
    together.draft(rows, 3)
    grown = {i: [*rows[i], 7, 8] for i in (0, 2)}
    assert together.draft(grown, 3) == ContextTowerDrafter(model, 4, 64).draft(grown, 3)


def test_continuing_prompts_of_any_lengths_is_generate_alone(language_model: PreTrainedModel) -> None:
    prompts = [text.prompt for text in TEXTS]
    new = continue_prompts(language_model, prompts, 9, Sampler(), [], [0] * 4)
    for prompt, tokens in zip(prompts, new, strict=True):
        ids = torch.tensor([prompt])
        alone = language_model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens == alone[0, len(prompt) :].tolist()


def test_sampled_text_depends_on_its_seed_alone_and_default_generators_are_untouched(
    language_model: PreTrainedModel,
) -> None:
    prompts = [text.prompt for text in TEXTS]
    state = torch.get_rng_state()
    together = continue_prompts(language_model, prompts, 9, Sampler(0.7), [], [3, 4, 5, 6])
    assert continue_prompts(language_model, prompts[2:3], 9, Sampler(0.7), [], [5])[0] == together[2]
    assert continue_prompts(language_model, prompts[2:3], 9, Sampler(0.7), [], [6])[0] != together[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_end_at_the_end_token_and_keep_it(language_model: PreTrainedModel) -> None:
    free = write_texts(language_model, [TEXTS[0].prompt], 9, 0.0, [])[0].text
    end = free[3]
    assert write_texts(language_model, [TEXTS[0].prompt], 9, 0.0, [end])[0].text == free[: free.index(end) + 1]


def test_rows_that_end_leave_the_batch_and_the_others_go_on_as_alone(language_model: PreTrainedModel) -> None:
    prompts = [random_ids(3 + i, i) for i in range(8)]
    free = continue_prompts(language_model, prompts, 20, Sampler(0.9), [], list(range(8)))
    ends = {tokens[2] for tokens in free[:5]}
    together = continue_prompts(language_model, prompts, 20, Sampler(0.9), sorted(ends), list(range(8)))
    for tokens, all_tokens in zip(together, free, strict=True):
        stop = next((i for i, token in enumerate(all_tokens) if token in ends), 19)
        assert tokens == all_tokens[: stop + 1]
    assert len({len(tokens) for tokens in together}) > 1


def test_a_draft_model_drafts_what_it_would_write(language_model: PreTrainedModel) -> None:
    prompts = {i: text.prompt for i, text in enumerate(TEXTS)}
    drafts = ModelDrafter(language_model).draft(prompts, 5)
    expected = continue_prompts(language_model, list(prompts.values()), 5, Sampler(), [], [0] * 4)
    assert list(drafts.values()) == expected


def test_a_draft_model_goes_on_with_rows_that_grow_and_leave(language_model: PreTrainedModel) -> None:
    rows = {i: text.prompt for i, text in enumerate(TEXTS)}
    drafter = ModelDrafter(language_model)
    for kept in ((0, 1, 2, 3), (0, 2, 3), (0, 2)):
        rows = {i: [*rows[i], *random_ids(1 + i, seed=len(rows[i]))] for i in kept}
        expected = continue_prompts(language_model, list(rows.values()), 4, Sampler(), [], [0] * len(rows))
        assert list(drafter.draft(rows, 4).values()) == expected


@pytest.mark.parametrize(
    ("tokens", "drafts"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1]),
        ([9, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1]),  # two tokens, as three do not occur before
        ([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], [8, 1, 2]),  # the last occurrence counts
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_ngram_lookup_takes_what_followed_last_time(tokens: list[int], drafts: list[int]) -> None:
    assert NgramDrafter().draft({0: tokens}, 3) == {0: drafts}


def test_repeated_4grams_are_counted_within_a_text() -> None:
    assert repeated_4gram_fraction([VerifierText([], [1, 2, 3, 4, 5])]) == 0
    assert repeated_4gram_fraction([VerifierText([], [7] * 7)]) == 0.75
    assert repeated_4gram_fraction([VerifierText([7, 7, 7, 7], [7])]) == 0
