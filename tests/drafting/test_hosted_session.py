"""Drafts from contexts that the target keeps: those of self-speculative generation, with no context tower."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.drafting.rounds import draft_rows
from tests.support.builders import random_ids, tiny_model
from tests.support.golden_files import checkpoint
from twotower_spec import ArgumentError, TwoTowerModel
from twotower_spec.drafting import (
    AdaptivePolicy,
    DraftPolicy,
    DraftRequest,
    FixedPolicy,
    HostedSession,
    RoundResult,
    ThresholdPolicy,
)
from twotower_spec.generation import self_speculative
from twotower_spec.generation.batch import Batch
from twotower_spec.generation.sampling import Sampler
from twotower_spec.generation.self_speculative import TokensByRow
from twotower_spec.state import ContextState

PROMPTS = [random_ids(length, seed=length) for length in (1, 17, 6)]


def contexts(rows: dict[str, list[int]], model: TwoTowerModel | None = None) -> ContextState:
    """State of a target that has read all tokens but the newest."""
    model = model or tiny_model()
    state = ContextState.for_towers(model, 4, 60)
    for name, row in rows.items():
        state.claim(name)
        if row[1:]:
            state.extend(model.context, {name: row[:-1]}, logits="none")
    return state


def session(rows: dict[str, list[int]], policy: DraftPolicy | None = None) -> HostedSession:
    return HostedSession(tiny_model(), contexts(rows), policy or FixedPolicy(8, 2))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(("block_size", "steps", "threshold"), [(8, 8, 0.05), (4, 1, 0.8), (2, 2, 0.8)])
def test_blocks_are_those_of_self_speculative_generation(
    temperature: float, block_size: int, steps: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny_model(), []
    real = self_speculative._draft

    def recording(batch: Batch, *others: Any) -> tuple[TokensByRow, list[int]]:
        texts = {str(row): [*batch.prompts[row], *batch.generated[row]] for row in batch.active}
        blocks, passes = real(batch, *others)
        seen.append((texts, list(blocks.values()), passes))
        return blocks, passes

    monkeypatch.setattr(self_speculative, "_draft", recording)
    seeds = [3, 4, 5]
    model.generate_self_speculative(
        PROMPTS,
        max_new_tokens=24,
        block_size=block_size,
        steps_per_block=steps,
        confidence_threshold=threshold,
        temperature=temperature,
        seed=seeds,
        eos_token_id=None,
    )
    assert len(seen) > 3
    for texts, blocks, passes in seen:
        hosted = HostedSession(
            model,
            contexts(texts),
            ThresholdPolicy(block_size, steps, threshold),
            sampler=Sampler(temperature) if temperature else Sampler(),
            noise="shared",
        )
        requests = [
            DraftRequest(row, text, len(block) - 1, seed=seeds[int(row)])
            for (row, text), block in zip(texts.items(), blocks, strict=True)
        ]
        done = hosted.draft([one for one in requests if one.max_draft_tokens])
        drafts = dict(zip(done.block.request_ids, done.block.rows(), strict=True))
        assert [drafts.get(row, []) for row in texts] == [block[1:] for block in blocks]
        counts = dict(zip(done.block.request_ids, done.block.num_denoiser_passes, strict=True))
        assert all(counts[row] == count for row, count in zip(texts, passes, strict=True) if row in counts)


POLICIES = [FixedPolicy(8, 1), FixedPolicy(8, 3, num_tokens=5), ThresholdPolicy(16, 16, 0.02), AdaptivePolicy([8])]


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_ragged_batch_get_the_drafts_they_get_alone(policy: DraftPolicy) -> None:
    rows = {name: random_ids(length, seed=length) for name, length in (("a", 1), ("b", 17), ("c", 3))}
    fixed = policy if not isinstance(policy, AdaptivePolicy) else AdaptivePolicy([8], may_skip=False)
    block = draft_rows(session(rows, fixed), rows)
    for i, (name, row) in enumerate(rows.items()):
        own = policy if not isinstance(policy, AdaptivePolicy) else AdaptivePolicy([8], may_skip=False)
        assert block.row(i) == draft_rows(session({name: row}, own), {name: row}).row(0)
    most = 5 if fixed.num_speculative_tokens == 5 else block.block_size - 1
    assert max(block.num_draft_tokens) <= most == block.confidence.shape[1]
    assert block.num_context_passes == [0, 0, 0]


def test_a_policy_learns_from_drafts_alone() -> None:
    rows = {"a": random_ids(9)}
    policy = AdaptivePolicy([8], may_skip=False)
    hosted = session(rows, policy)
    for _ in range(6):
        done = hosted.draft([DraftRequest("a", rows["a"])])
        count = done.block.num_draft_tokens[0]
        hosted.observe(done, RoundResult([count - 1], 0.01))
    # The newest token is no trial: a calibrated position is a draft's, and the last of seven is the block's last.
    trials = policy.calibration.trials[8].sum(axis=(0, 2))
    assert trials[0] == pytest.approx(6, abs=0.1) and trials[7] == 0


def test_a_newest_token_that_is_the_mask_token_stands_and_costs_no_pass() -> None:
    mask = tiny_model().config.mask_token_id
    for policy in (FixedPolicy(8, 1), AdaptivePolicy([8], most_steps=1, may_skip=False)):
        rows = {"a": [*random_ids(9), mask]}
        block = draft_rows(session(rows, policy), rows)
        assert block.num_denoiser_passes == [1] and mask not in block.row(0)


def test_requests_that_get_nothing_are_counted_and_others_go_on() -> None:
    rows = {name: random_ids(9, seed=i) for i, name in enumerate("abcd")}
    hosted = session(rows)
    done = hosted.draft(
        [
            DraftRequest("a", rows["a"]),
            DraftRequest("b", rows["b"], 0),
            DraftRequest("c", rows["c"], read_only=True),
            DraftRequest("d", [*rows["d"], 10**6]),
        ]
    )
    assert done.block.num_draft_tokens == [7, 0, 0, 0]
    assert +done.without_drafts == {"limit": 1, "prefilling": 1, "foreign token": 1}
    assert done.num_context_tokens == 0 and hosted.request_ids == ()


def test_nan_of_one_context_costs_that_request_alone_and_it_is_tried_again() -> None:
    rows = {name: random_ids(9, seed=i) for i, name in enumerate("ab")}
    hosted = session(rows)
    state = hosted.source
    assert isinstance(state, ContextState)
    sound = state.mamba.ssm[:, state.entry("a").slot].clone()
    state.mamba.ssm[:, state.entry("a").slot] = math.nan
    first = draft_rows(hosted, rows)
    assert first.num_draft_tokens == [0, 7] and hosted.without_drafts["not finite"] == 1
    state.mamba.ssm[:, state.entry("a").slot] = sound
    assert draft_rows(hosted, rows).num_draft_tokens == [7, 7]


def test_a_denoiser_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    both, alone = (TwoTowerModel.from_pretrained(checkpoint("T1"), towers=towers) for towers in ("both", "denoiser"))
    rows = {"a": random_ids(9, vocab_size=both.config.vocab_size)}
    source = contexts(rows, both)
    hosted = HostedSession(alone, source, FixedPolicy(8, 1))
    with monkeypatch.context() as patch:
        patch.delattr(ContextState, "extend")
        hosted.warm_up()
        block = draft_rows(hosted, rows)
    assert block.row(0) == draft_rows(HostedSession(both, source, FixedPolicy(8, 1)), rows).row(0)
    memory = hosted.memory()
    assert memory.context_tower_bytes == memory.state_bytes == 0
    assert str(memory).startswith("no context tower and no state of its own, denoiser tower ")


def test_blocks_without_room_for_drafts_are_refused() -> None:
    with pytest.raises(ArgumentError, match="blocks of 2 or more"):
        HostedSession(tiny_model(), contexts({}), FixedPolicy(1, 1))


def test_the_first_step_s_distributions_are_those_of_the_drafts() -> None:
    rows = {"a": random_ids(9), "b": random_ids(4, seed=1)}
    hosted = HostedSession(tiny_model(), contexts(rows), FixedPolicy(4, 1), sampler=Sampler(0.7))
    block = draft_rows(hosted, rows)
    assert block.probs is not None and block.probs.shape[:2] == (2, 3)
    torch.testing.assert_close(block.probs.sum(-1), torch.ones(2, 3, dtype=block.probs.dtype))
    assert (block.probs.gather(2, block.token_ids[..., None]) > 0).all()
