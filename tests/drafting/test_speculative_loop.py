"""The loop writes exactly the target's text, whatever is drafted and whatever else is in the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MptConfig,
    OpenAIGPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.drafting.models import greedy_texts, tiny_target
from tests.support.builders import random_ids, tiny_model
from twotower_spec import ArgumentError
from twotower_spec.drafting import (
    AdaptivePolicy,
    DraftingSession,
    DraftRequest,
    FixedPolicy,
    Round,
    SpeculativeRun,
    ThresholdPolicy,
    speculative_loop,
)
from twotower_spec.drafting.policies import DraftPolicy
from twotower_spec.generation.sampling import Sampler

PROMPTS = [random_ids(5), random_ids(9, seed=1), random_ids(2, seed=2), random_ids(1, seed=3)]
SAMPLER = Sampler(0.8, top_k=20, min_p=0.01)


def drafter(policy: DraftPolicy | None = None, **options: object) -> DraftingSession:
    return DraftingSession(tiny_model(), policy or FixedPolicy(8, 1), **options)  # type: ignore[arg-type]


def perfect(monkeypatch: pytest.MonkeyPatch, num_tokens: int, texts: list[list[int]]) -> DraftingSession:
    """Drafter whose blocks are overwritten with the target's own next tokens."""
    block_drafter = drafter(FixedPolicy(max(num_tokens, 2), 1, num_tokens=num_tokens))
    whole = [[*prompt, *text] for prompt, text in zip(PROMPTS, texts, strict=True)]
    make = block_drafter.draft

    @torch.inference_mode()
    def draft(requests: Sequence[DraftRequest]) -> Round:
        drafted = make(requests)
        block = drafted.block
        for i, one in enumerate(requests):
            row = list(one.token_ids)
            source = next(text for text in whole if text[: len(row)] == row)
            right = source[len(row) : len(row) + block.num_draft_tokens[i]]
            block.token_ids[i, : len(right)] = torch.tensor(right, dtype=torch.long)
        return drafted

    monkeypatch.setattr(block_drafter, "draft", draft)
    return block_drafter


@pytest.mark.parametrize(
    "policy", [ThresholdPolicy(8, 8, 0.8), FixedPolicy(4, 1), FixedPolicy(16, 2, num_tokens=5), AdaptivePolicy()]
)
@pytest.mark.parametrize("first_token", ["context", "denoiser"])
def test_greedy_text_is_that_of_generate(policy: DraftPolicy, first_token: str) -> None:
    expected = greedy_texts(tiny_target(), PROMPTS, 20)
    together = speculative_loop(tiny_target(), drafter(policy, first_token=first_token), PROMPTS, 20)
    assert together.token_ids == expected
    assert together.finish_reasons == ["length"] * 4


@pytest.mark.parametrize("num_tokens", [1, 3, 15])
def test_greedy_text_is_that_of_generate_when_drafts_are_right(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    expected = greedy_texts(tiny_target(), PROMPTS, 21)
    result = speculative_loop(tiny_target(), perfect(monkeypatch, num_tokens, expected), PROMPTS, 21)
    assert result.token_ids == expected
    assert result.summary.num_accepted_tokens == result.summary.num_draft_tokens > 0
    assert result.summary.num_rounds == 4 * -(-20 // (num_tokens + 1))
    assert sum(map(sum, result.accepted)) == result.summary.num_accepted_tokens


@pytest.mark.parametrize("rule", ["greedy", "one-hot", "coupled"])
def test_at_temperature_0_every_rule_gives_the_greedy_text(rule: str) -> None:
    expected = greedy_texts(tiny_target(), PROMPTS, 12)
    assert speculative_loop(tiny_target(), drafter(), PROMPTS, 12, verification_rule=rule).token_ids == expected


def test_coupled_text_of_a_seed_is_always_the_same() -> None:
    seeds = [11, 12, 13, 14]
    plain = speculative_loop(tiny_target(), None, PROMPTS, 16, SAMPLER, "coupled", seed=seeds)
    assert plain.token_ids != greedy_texts(tiny_target(), PROMPTS, 16)
    ways: list[DraftingSession] = [
        drafter(ThresholdPolicy(8, 8, 0.5)),
        drafter(ThresholdPolicy(8, 8, 0.9), first_token="denoiser"),
        drafter(FixedPolicy(4, 1)),
        drafter(FixedPolicy(16, 3, num_tokens=7)),
        drafter(AdaptivePolicy()),
        drafter(FixedPolicy(8, 2), sampler=SAMPLER, noise="private"),
        drafter(FixedPolicy(8, 2), sampler=SAMPLER, noise="shared"),
    ]
    for way in ways:
        again = speculative_loop(tiny_target(), way, PROMPTS, 16, SAMPLER, "coupled", seed=seeds)
        assert again.token_ids == plain.token_ids
    for row in range(4):
        alone = speculative_loop(tiny_target(), drafter(), [PROMPTS[row]], 16, SAMPLER, "coupled", seed=[seeds[row]])
        assert alone.token_ids == [plain.token_ids[row]]


def test_sharing_the_targets_noise_is_accepted_more_often() -> None:
    prompts, flat = [random_ids(6, seed=i) for i in range(40)], Sampler(3.0)
    lengths = {}
    for noise in ("private", "shared"):
        way = drafter(FixedPolicy(4, 1), sampler=flat, noise=noise, num_slots=40)
        result = speculative_loop(tiny_target(), way, prompts, 24, flat, "coupled", seed=0)
        lengths[noise] = result.summary.acceptance_length
    assert lengths["shared"] > lengths["private"]


@pytest.mark.parametrize("num_tokens", [1, 4, 15])
def test_an_end_token_inside_a_block_ends_the_row_there(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    free = greedy_texts(tiny_target(), PROMPTS, 24)
    for eos in sorted({text[i] for text in free for i in (0, 3, 9, 23)}):
        expected = greedy_texts(tiny_target(), PROMPTS, 24, eos=eos)
        result = speculative_loop(
            tiny_target(), perfect(monkeypatch, num_tokens, free), PROMPTS, 24, eos_token_id=[eos, 60]
        )
        stopped = [text[: text.index(60) + 1] if 60 in text else text for text in expected]
        assert result.token_ids == stopped
        for text, reason in zip(result.token_ids, result.finish_reasons, strict=True):
            assert reason == ("eos" if text[-1] in (eos, 60) else "length")


class Letters:
    """Tokenizer of one character per id, for stop strings."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(65 + token) for token in ids)


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    free = greedy_texts(tiny_target(), PROMPTS, 24)
    stop = Letters().decode(free[1][9:12])
    result = speculative_loop(
        tiny_target(),
        perfect(monkeypatch, 7, free),
        PROMPTS,
        24,
        stop_strings=[stop],
        tokenizer=Letters(),  # type: ignore[arg-type]
    )
    for text, whole, reason in zip(result.token_ids, free, result.finish_reasons, strict=True):
        end = Letters().decode(whole).find(stop)
        assert text == (whole if end < 0 else whole[: end + 3])
        assert reason == ("length" if end < 0 else "stop")
    assert "stop" in result.finish_reasons


def test_steps_are_streamed_as_they_are_verified() -> None:
    run = SpeculativeRun(tiny_target(), drafter(), PROMPTS, 10)
    seen: list[list[int]] = [[] for _ in PROMPTS]
    for step in run:
        seen[step.row] += step.token_ids
        assert run.token_ids[step.row][: len(seen[step.row])] == seen[step.row]
    assert seen == greedy_texts(tiny_target(), PROMPTS, 10)


def test_a_run_that_is_left_early_gives_back_its_requests() -> None:
    way = drafter()
    run = SpeculativeRun(tiny_target(), way, PROMPTS, 40)
    for _ in range(9):
        next(iter(run))
    assert len(way.state) == 4
    run.close()
    assert len(way.state) == 0


def test_a_run_that_was_left_goes_on_where_it_was() -> None:
    run = SpeculativeRun(tiny_target(), drafter(), PROMPTS, 15)
    for count, _ in enumerate(run):
        if count == 13:
            break
    for _ in run:
        pass
    assert run.token_ids == greedy_texts(tiny_target(), PROMPTS, 15)
    assert list(run) == []


def sliding_window_target() -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6,
    )  # fmt: skip
    return with_random_weights(config)


def with_random_weights(config: PretrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = 0.35 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(wide if parameter.dim() > 1 else 1 + wide)
    return model


def alibi_target() -> PreTrainedModel:
    """Target that counts positions itself, by the place in the cache."""
    return with_random_weights(MptConfig(vocab_size=61, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2))


def target_without_cache() -> PreTrainedModel:
    return with_random_weights(OpenAIGPTConfig(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("make", [sliding_window_target, alibi_target, target_without_cache])
def test_a_target_whose_cache_cannot_be_cut_back_is_read_anew(
    make: Callable[[], PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    with caplog.at_level(logging.WARNING):
        result = speculative_loop(model, drafter(), PROMPTS, 20)
    assert result.token_ids == greedy_texts(model, PROMPTS, 20)
    assert "cannot be cut back" in caplog.text


@pytest.mark.parametrize("vocab_size", [61, 80, 40])
@pytest.mark.parametrize(("rule", "sampler"), [("greedy", Sampler()), ("p/q", Sampler(0.9)), ("block", Sampler(0.9))])
def test_a_target_with_a_larger_or_smaller_table_works(vocab_size: int, rule: str, sampler: Sampler) -> None:
    model = tiny_target(vocab_size)
    prompts = [random_ids(5, vocab_size=40), random_ids(3, seed=1, vocab_size=40)]
    way = drafter(sampler=sampler, num_token_ids=min(61, vocab_size))
    result = speculative_loop(model, way, prompts, 30, sampler, rule, seed=1)
    assert [len(text) for text in result.token_ids] == [30, 30]
    if rule == "greedy":
        assert result.token_ids == greedy_texts(model, prompts, 30)
    beyond = any(token >= 61 for text in result.token_ids for token in text)
    assert (way.without_drafts["foreign token"] > 0) == beyond


def test_refusals_come_before_anything_is_generated() -> None:
    with pytest.raises(ArgumentError, match="num_token_ids=40"):
        speculative_loop(tiny_target(40), drafter(), [[5]], 4)
    with pytest.raises(ArgumentError, match="3 denoising steps"):
        speculative_loop(tiny_target(), drafter(FixedPolicy(8, 3), sampler=SAMPLER), [[5]], 4, SAMPLER, "p/q")
    with pytest.raises(ArgumentError, match="verification rule 'lucky'"):
        speculative_loop(tiny_target(), None, [[5]], 4, verification_rule="lucky")
    with pytest.raises(ArgumentError, match="need a tokenizer"):
        speculative_loop(tiny_target(), None, [[5]], 4, stop_strings=["x"])
    with pytest.raises(ArgumentError, match="one string; give a list"):
        speculative_loop(tiny_target(), None, [[5]], 4, stop_strings="END", tokenizer=Letters())  # type: ignore[arg-type]


def test_no_new_tokens_are_no_new_tokens() -> None:
    assert speculative_loop(tiny_target(), drafter(), PROMPTS, 0).token_ids == [[], [], [], []]
    assert speculative_loop(tiny_target(), drafter(), PROMPTS, 1).token_ids == greedy_texts(tiny_target(), PROMPTS, 1)
