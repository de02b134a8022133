"""Draws of the rules follow their stated probabilities, and whole texts the target. N and bounds fixed beforehand."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from tests.drafting.models import (
    draft_outcomes,
    target_probs,
    tiny_drafting_model,
    tiny_target,
)
from tests.support.builders import tiny_model
from twotower_spec.drafting import VERIFICATION_RULES, DraftingSession, FixedPolicy, speculative_loop
from twotower_spec.drafting.draft_block import DraftBlock, Provenance
from twotower_spec.drafting.policies import FixedSteps
from twotower_spec.drafting.verification import RejectingRule
from twotower_spec.generation.sampling import Sampler

NUM_ROUNDS = 20_000
LEAST_P = 1e-4
SAMPLER = Sampler(0.8)


def repeated(block: DraftBlock, count: int) -> DraftBlock:
    assert block.probs is not None
    return DraftBlock(
        request_ids=tuple(range(count)),
        block_size=block.block_size,
        token_ids=block.token_ids.repeat(count, 1),
        num_draft_tokens=block.num_draft_tokens * count,
        confidence=block.confidence.repeat(count, 1),
        num_denoiser_passes=block.num_denoiser_passes * count,
        num_context_passes=block.num_context_passes * count,
        provenance=Provenance(1, "private", True),
        probs=block.probs.repeat(count, 1, 1),
    )


@pytest.mark.parametrize("name", ["one-hot", "p/q", "block"])
def test_outcomes_are_drawn_with_the_probabilities_of_the_rule(name: str) -> None:
    rule = VERIFICATION_RULES[name]
    assert isinstance(rule, RejectingRule)
    prompt = [1, 2, 0, 2]
    drafts = list(draft_outcomes(tiny_drafting_model(4), prompt, 3, FixedSteps(1, 0.5), SAMPLER, False))
    draft = max(drafts, key=lambda draft: draft.probability)
    probs = target_probs(tiny_target(4), prompt, Sampler(1.0), 4)
    logits = torch.stack([probs[draft.tokens[:i]].log() for i in range(4)])[None]
    block = repeated(draft.block("private"), NUM_ROUNDS)
    outcome = rule.verify(
        logits.expand(NUM_ROUNDS, -1, -1), block, SAMPLER, torch.arange(NUM_ROUNDS), torch.full((NUM_ROUNDS,), 4)
    )
    counts = torch.zeros(4, 4)
    for count, token in zip(outcome.num_accepted, outcome.next_tokens, strict=True):
        counts[count, token] += 1
    rows = SAMPLER.probs(logits)
    one = draft.block("private")
    lengths = rule.length_probs(rows, one)[0]
    following = torch.stack([rule.next_token_probs(rows, one, torch.tensor([n]))[0] for n in range(4)])
    expected = (lengths[:, None] * following * NUM_ROUNDS).flatten()
    possible = expected > 0
    assert counts.flatten()[~possible].sum() == 0
    assert stats.chisquare(counts.flatten()[possible].numpy(), expected[possible].numpy()).pvalue > LEAST_P


@pytest.mark.parametrize(
    ("rule", "sampler", "steps"),
    [("one-hot", Sampler(), 2), ("coupled", SAMPLER, 2), ("p/q", SAMPLER, 1), ("block", SAMPLER, 1)],
)
def test_whole_texts_are_distributed_as_the_targets(rule: str, sampler: Sampler, steps: int) -> None:
    """Several rounds per text, drafts of a real denoiser: 4000 texts of 4 tokens over 4 ids, p > 1e-4."""
    count, length, prompt = 4000, 4, [1, 2, 0, 2]
    model = tiny_model(vocab_size=4, hybrid_override_pattern="M*E", seed=2)
    drafter = DraftingSession(model, FixedPolicy(2, steps), sampler=sampler, num_slots=count, num_tokens=count * 16)
    result = speculative_loop(
        tiny_target(4), drafter, [prompt] * count, length, SAMPLER, rule, seed=[7919 * i for i in range(count)]
    )
    assert result.summary.num_accepted_tokens > 0
    probs = target_probs(tiny_target(4), prompt, SAMPLER, length)
    found, expected = torch.zeros((4,) * length), torch.zeros((4,) * length)
    for text in result.token_ids:
        found[tuple(text)] += 1
    for index in torch.cartesian_prod(*[torch.arange(4)] * length).tolist():
        chance = 1.0
        for i, token in enumerate(index):
            chance *= float(probs[tuple(index[:i])][token])
        expected[tuple(index)] = chance * count
    # Rare texts are counted together: chi-squared wants 5 expected of each.
    rare = expected < 5
    observed = torch.cat([found[~rare], found[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    assert stats.chisquare(observed.numpy(), wanted.numpy() * (count / float(wanted.sum()))).pvalue > LEAST_P
