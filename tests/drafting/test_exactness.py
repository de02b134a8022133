"""The distribution of the text is the target's: all outcomes enumerated, for every rule and every way to draft."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.drafting.models import Outcome, draft_outcomes, target_probs, tiny_drafting_model, tiny_target
from twotower_spec import ArgumentError
from twotower_spec.drafting import VERIFICATION_RULES, AdaptivePolicy, DraftingSession, DraftRequest, RoundResult
from twotower_spec.drafting.policies import FixedSteps
from twotower_spec.drafting.verification import BlockRule, GreedyRule, OneHotRule, ProbabilityRatioRule, RejectingRule
from twotower_spec.generation.denoising import CommitRule, PublishedSchedule
from twotower_spec.generation.sampling import Sampler

PROMPT = [1, 2, 0, 2]
VOCAB = 4
EXACT = 1e-12
SAMPLER = Sampler(0.8)
GREEDY = Sampler()

ONE_STEP, TWO_STEPS, PUBLISHED = FixedSteps(1, 0.5), FixedSteps(2, 0.5), PublishedSchedule(0.4, 3)
RULE_NAMES = {ONE_STEP: "one step", TWO_STEPS: "two steps", PUBLISHED: "published schedule"}

# Ways to draft: block size, commit rule, sampler, and whether the context tower makes the first token.
MULTI_STEP_SAMPLES = [(2, TWO_STEPS, SAMPLER, False), (3, TWO_STEPS, SAMPLER, True), (3, PUBLISHED, SAMPLER, False)]
ONE_STEP_SAMPLES = [(size, ONE_STEP, SAMPLER, first) for size in (2, 3, 4) for first in (False, True)]
MOST_PROBABLE = [(size, rule, GREEDY, first) for size in (2, 4) for rule in RULE_NAMES for first in (False, True)]
Making = tuple[int, CommitRule, Sampler, bool]
Text = tuple[int, ...]
# Texts that a round may bring, with their probabilities.
Results = Iterator[tuple[Text, float]]


@cache
def outcomes(making: Making) -> list[Outcome]:
    size, rule, sampler, first = making
    return list(draft_outcomes(tiny_drafting_model(VOCAB), PROMPT, size, rule, sampler, first))


@cache
def target(size: int, sampler: Sampler) -> dict[Text, Tensor]:
    return target_probs(tiny_target(VOCAB), PROMPT, sampler, size + 1)


def continuation(probs: dict[Text, Tensor], text: Text, length: int) -> Tensor:
    """The target's distribution [vocab, vocab, ...] of what follows a text, up to `length` tokens in all."""
    if len(text) == length:
        return torch.ones((), dtype=torch.float64)
    rows = [p * continuation(probs, (*text, token), length) for token, p in enumerate(probs[text])]
    return torch.stack(rows)


def text_distribution(results: Results, probs: dict[Text, Tensor], length: int) -> Tensor:
    """Distribution of the first `length` tokens: what a round brought, continued by the target."""
    by_text: dict[Text, float] = defaultdict(float)
    for text, probability in results:
        by_text[text] += probability
    total = torch.zeros((VOCAB,) * length, dtype=torch.float64)
    for text, probability in by_text.items():
        total[text] += probability * continuation(probs, text, length)
    return total


def after_rejecting(rule: RejectingRule, drafts: list[Outcome], probs: dict[Text, Tensor]) -> Results:
    for draft in drafts:
        size = len(draft.tokens)
        rows = torch.stack([probs[draft.tokens[:i]] for i in range(size + 1)])[None]
        block = draft.block("private")
        lengths = rule.length_probs(rows, block)[0]
        assert abs(float(lengths.sum()) - 1) < EXACT
        for count in range(size + 1):
            following = rule.next_token_probs(rows, block, torch.tensor([count]))[0]
            for token in range(VOCAB):
                yield (*draft.tokens[:count], token), draft.probability * float(lengths[count] * following[token])


def after_comparing(drafts: list[Outcome], probs: dict[Text, Tensor]) -> Results:
    """The target's own tokens at every position, all combinations; they do not depend on the drafts."""
    for draft in drafts:
        width = len(draft.tokens) + 1
        own = torch.tensor(list(itertools.product(range(VOCAB), repeat=width)))
        block, zeros = draft.block("private"), torch.zeros(len(own), dtype=torch.int64)
        together = replace(block, token_ids=block.token_ids.expand(len(own), -1))
        outcome = GreedyRule().verify(torch.nn.functional.one_hot(own).double(), together, GREEDY, zeros, zeros)
        chances = torch.ones(1, dtype=torch.float64)
        for i in range(width):
            chances = (chances[:, None] * probs[draft.tokens[:i]]).flatten()
        for chance, count, following in zip(chances.tolist(), outcome.num_accepted, outcome.next_tokens, strict=True):
            yield (*draft.tokens[:count], following), draft.probability * chance


def distance(found: Tensor, probs: dict[Text, Tensor]) -> float:
    return float((found - continuation(probs, (), found.dim())).abs().max())


def name(making: Making) -> str:
    size, rule, sampler, first = making
    parts = [f"{size} tokens", RULE_NAMES[rule], "most probable" if sampler.greedy else "sampled"]  # type: ignore[index]
    return ", ".join([*parts, "first from context"] if first else parts)


@pytest.mark.parametrize("making", ONE_STEP_SAMPLES + MULTI_STEP_SAMPLES + MOST_PROBABLE, ids=name)
def test_drafts_are_enumerated_whole(making: Making) -> None:
    assert sum(draft.probability for draft in outcomes(making)) == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize("making", ONE_STEP_SAMPLES + MULTI_STEP_SAMPLES + MOST_PROBABLE, ids=name)
def test_one_hot_rule_is_exact_however_drafts_are_made(making: Making) -> None:
    probs = target(making[0], SAMPLER)
    found = text_distribution(after_rejecting(OneHotRule(), outcomes(making), probs), probs, making[0] + 1)
    assert distance(found, probs) < EXACT


@pytest.mark.parametrize("making", ONE_STEP_SAMPLES + MULTI_STEP_SAMPLES + MOST_PROBABLE, ids=name)
def test_coupled_rule_is_exact_however_drafts_are_made(making: Making) -> None:
    probs = target(making[0], SAMPLER)
    found = text_distribution(after_comparing(outcomes(making), probs), probs, making[0] + 1)
    assert distance(found, probs) < EXACT


@pytest.mark.parametrize("making", [ONE_STEP_SAMPLES[0], MULTI_STEP_SAMPLES[1], MOST_PROBABLE[-1]], ids=name)
def test_greedy_rule_gives_the_most_probable_text(making: Making) -> None:
    probs = target(making[0], GREEDY)
    found = text_distribution(after_comparing(outcomes(making), probs), probs, making[0] + 1)
    assert distance(found, probs) < EXACT
    assert float(found.max()) > 1 - EXACT


@pytest.mark.parametrize("rule", [ProbabilityRatioRule(), BlockRule()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("making", ONE_STEP_SAMPLES, ids=name)
def test_ratio_rules_are_exact_for_samples_of_one_step(making: Making, rule: RejectingRule) -> None:
    probs, drafts = target(making[0], SAMPLER), outcomes(making)
    rule.require_exact(drafts[0].block("private").provenance, SAMPLER)
    found = text_distribution(after_rejecting(rule, drafts, probs), probs, making[0] + 1)
    assert distance(found, probs) < EXACT


@pytest.mark.parametrize("rule", [ProbabilityRatioRule(), BlockRule()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("making", MULTI_STEP_SAMPLES, ids=name)
def test_ratio_rules_would_change_the_text_of_multi_step_drafts_and_refuse_them(
    making: Making, rule: RejectingRule
) -> None:
    probs, drafts = target(making[0], SAMPLER), outcomes(making)
    found = text_distribution(after_rejecting(rule, drafts, probs), probs, making[0] + 1)
    assert distance(found, probs) > 1e-4
    several = next(draft for draft in drafts if draft.num_steps > 1)
    with pytest.raises(ArgumentError, match="denoising steps"):
        rule.require_exact(several.block("private").provenance, SAMPLER)


@pytest.mark.parametrize("filters", [Sampler(0.7, top_k=3), Sampler(1.3, top_p=0.8), Sampler(1.0, min_p=0.3)])
@pytest.mark.parametrize("rule", [OneHotRule(), ProbabilityRatioRule(), BlockRule()], ids=lambda rule: rule.name)
def test_filters_belong_to_the_target_before_any_rule(rule: RejectingRule, filters: Sampler) -> None:
    probs = target(2, filters)
    assert any(float(p.min()) == 0 for p in probs.values())
    found = text_distribution(after_rejecting(rule, outcomes(ONE_STEP_SAMPLES[0]), probs), probs, 3)
    assert distance(found, probs) < EXACT


@pytest.mark.parametrize("rule", [ProbabilityRatioRule(), BlockRule()], ids=lambda rule: rule.name)
def test_choosing_drafts_by_their_confidence_is_refused_by_ratio_rules(rule: RejectingRule) -> None:
    """An adaptive policy decides by a draft whether to verify it, so that verified drafts are no samples of q."""
    drafter = DraftingSession(tiny_drafting_model(VOCAB), AdaptivePolicy([4], most_steps=1), sampler=SAMPLER)
    drafted = drafter.draft([DraftRequest(0, PROMPT)])
    while not drafted.block.num_draft_tokens[0]:
        drafter.observe(drafted, RoundResult([0], 0.01))
        drafted = drafter.draft([DraftRequest(0, PROMPT)])
    block = drafted.block
    assert block.probs is None
    for made in (drafter.provenance, block.provenance):
        with pytest.raises(ArgumentError, match="chose by their confidence"):
            rule.require_exact(made, SAMPLER)
    VERIFICATION_RULES["one-hot"].require_exact(block.provenance, SAMPLER)


@pytest.mark.parametrize("rule", [OneHotRule(), ProbabilityRatioRule(), BlockRule()], ids=lambda rule: rule.name)
def test_rows_with_different_numbers_of_drafts_are_decided_as_alone(rule: RejectingRule) -> None:
    drafts = outcomes(ONE_STEP_SAMPLES[4])[:5]
    counts = [0, 4, 1, 3, 2]
    probs = target(4, SAMPLER)
    rows = torch.stack([torch.stack([probs[draft.tokens[:i]] for i in range(5)]) for draft in drafts])
    blocks = [draft.block("private") for draft in drafts]
    keep = torch.arange(4) < torch.tensor(counts)[:, None]
    together = replace(
        blocks[0],
        request_ids=tuple(range(5)),
        token_ids=torch.cat([block.token_ids for block in blocks]).masked_fill(~keep, -1),
        num_draft_tokens=counts,
        probs=torch.cat([block.probs for block in blocks if block.probs is not None]),
    )
    lengths = rule.length_probs(rows, together)
    for i, (block, count) in enumerate(zip(blocks, counts, strict=True)):
        if count:
            assert block.probs is not None
            alone = replace(
                block, token_ids=block.token_ids[:, :count], num_draft_tokens=[count], probs=block.probs[:, :count]
            )
            expected = rule.length_probs(rows[i : i + 1, : count + 1], alone)[0]
        else:
            expected = torch.ones(1, dtype=torch.float64)
        assert torch.equal(lengths[i, : count + 1], expected) and float(lengths[i, count + 1 :].sum()) == 0


def test_block_rule_accepts_at_least_as_much_as_token_by_token() -> None:
    probs, drafts = target(3, SAMPLER), outcomes(ONE_STEP_SAMPLES[2])

    def mean_length(rule: RejectingRule) -> float:
        total = 0.0
        for draft in drafts:
            rows = torch.stack([probs[draft.tokens[:i]] for i in range(4)])[None]
            lengths = rule.length_probs(rows, draft.block("private"))[0]
            total += draft.probability * float(lengths @ torch.arange(4.0, dtype=lengths.dtype))
        return total

    assert mean_length(BlockRule()) > mean_length(ProbabilityRatioRule())


@pytest.mark.parametrize("name", ["p/q", "block"])
def test_ratio_rules_say_why_they_refuse_other_drafts(name: str) -> None:
    draft = outcomes(MOST_PROBABLE[0])[0]
    with pytest.raises(ArgumentError, match="no distribution was kept"):
        VERIFICATION_RULES[name].require_exact(draft.block("none").provenance, SAMPLER)
    with pytest.raises(ArgumentError, match="the target's own noise"):
        VERIFICATION_RULES[name].require_exact(draft.block("shared").provenance, SAMPLER)
    with pytest.raises(ArgumentError, match=r"temperature 0, not 0\.8"):
        VERIFICATION_RULES["greedy"].require_exact(draft.block("none").provenance, SAMPLER)
