"""The drafter: requests come and go, and a request's drafts are those it would get alone."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.drafting.rounds import draft_rows
from tests.support.builders import random_ids, tiny_model
from twotower_spec import ArgumentError
from twotower_spec.drafting import (
    AdaptivePolicy,
    DraftBlock,
    DraftingSession,
    DraftRequest,
    FixedPolicy,
    RoundResult,
    ThresholdPolicy,
)
from twotower_spec.drafting.draft_block import Provenance
from twotower_spec.drafting.policies import DraftPlan, DraftPolicy
from twotower_spec.generation import PhaseTimes
from twotower_spec.generation.sampling import Sampler

POLICIES = [
    FixedPolicy(8, 1),
    FixedPolicy(8, 3, num_tokens=5),
    ThresholdPolicy(4, 4, 0.5),
    ThresholdPolicy(16, 16, 0.02),
]


def make(policy: DraftPolicy | None = None, **options: object) -> DraftingSession:
    return DraftingSession(tiny_model(), policy or FixedPolicy(8, 2), **options)  # type: ignore[arg-type]


def drafts(block: DraftBlock) -> dict[object, list[int]]:
    return {request_id: block.row(i) for i, request_id in enumerate(block.request_ids)}


def alone(row: list[int], policy: DraftPolicy | None = None, **options: object) -> list[int]:
    return draft_rows(make(policy, **options), {"only": row}).row(0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("first_token", ["context", "denoiser"])
def test_rows_of_a_ragged_batch_get_the_drafts_they_get_alone(policy: DraftPolicy, first_token: str) -> None:
    rows = {name: random_ids(length, seed=length) for name, length in (("a", 1), ("b", 17), ("c", 3))}
    block = draft_rows(make(policy, first_token=first_token), rows)
    assert drafts(block) == {name: alone(row, policy, first_token=first_token) for name, row in rows.items()}
    assert block.num_draft_tokens == [policy.num_speculative_tokens] * 3
    assert all(0 < c <= 1 for c in block.confidence.flatten().tolist())
    assert tiny_model().config.mask_token_id not in block.token_ids


def test_a_policy_with_few_tokens_uses_the_left_part_of_its_block() -> None:
    row = random_ids(9)
    assert alone(row, FixedPolicy(8, 1, num_tokens=3)) == alone(row, FixedPolicy(8, 1))[:3]


def test_drafts_do_not_depend_on_how_the_row_came_about() -> None:
    row = random_ids(30)
    drafter = make()
    for length in (5, 6, 14, 30):
        block = draft_rows(drafter, {"a": row[:length]})
        assert block.row(0) == alone(row[:length])
    assert drafter.state.num_restarts == 0


def test_a_row_that_was_not_continued_is_started_over_alone() -> None:
    drafter, a, b = make(), random_ids(12), random_ids(12, seed=1)
    draft_rows(drafter, {"a": a, "b": b})
    changed = [*a[:6], *random_ids(4, seed=2)]
    block = draft_rows(drafter, {"a": changed, "b": [*b, 7]})
    assert drafts(block) == {"a": alone(changed), "b": alone([*b, 7])}
    assert drafter.state.num_restarts == 1
    shorter = draft_rows(drafter, {"b": b[:5]})
    assert shorter.row(0) == alone(b[:5]) and drafter.state.num_restarts == 2


def test_requests_may_vanish_and_return_in_any_order() -> None:
    drafter, rows = make(num_slots=2), {name: random_ids(6, seed=i) for i, name in enumerate("abcd")}
    for present in ("ab", "c", "ba", "d", "dc", "a", "cb"):
        block = draft_rows(drafter, {name: rows[name] for name in present})
        for name, tokens in drafts(block).items():
            assert tokens == alone(rows[str(name)])
            rows[str(name)] = [*rows[str(name)], *tokens[:2]]
    assert drafter.state.num_evictions > 0


def test_the_same_row_twice_gets_the_same_drafts() -> None:
    drafter, row = make(), random_ids(10)
    first = draft_rows(drafter, {"a": row})
    again = draft_rows(drafter, {"a": row})
    assert torch.equal(first.token_ids, again.token_ids)
    assert drafter.state.num_restarts == 0
    assert again.num_context_passes == [0] and first.num_context_passes == [1]


def test_a_long_prompt_is_read_within_the_budget_and_does_not_hold_up_the_others() -> None:
    drafter, long, short = make(token_budget=16), random_ids(70), random_ids(3, seed=1)
    rounds = []
    for _ in range(8):
        block = draft_rows(drafter, {"long": long, "short": short})
        rounds.append(block.num_draft_tokens)
        assert block.row(1) == alone(short)
        short = [*short, block.row(1)[0]]
    assert [counts[0] > 0 for counts in rounds] == [False] * 4 + [True] * 4
    assert drafter.without_drafts["prefilling"] == 4
    assert draft_rows(drafter, {"long": long}).row(0) == alone(long)


def test_a_row_that_shrinks_while_it_is_read_is_drafted_for() -> None:
    drafter, row = make(token_budget=16), random_ids(40)
    assert draft_rows(drafter, {"a": row}).num_draft_tokens == [0]
    assert draft_rows(drafter, {"a": row[:16]}).row(0) == alone(row[:16])
    draft_rows(drafter, {"a": row})
    assert draft_rows(drafter, {"a": row[:12]}).row(0) == alone(row[:12])


def test_room_reserved_for_a_longer_row_is_given_back() -> None:
    drafter = make(num_slots=3, num_tokens=160, token_budget=200)
    long, other = random_ids(150), random_ids(90, seed=1)
    drafter.token_budget = 20
    draft_rows(drafter, {"a": long})
    drafter.token_budget = 200
    block = draft_rows(drafter, {"a": long[:60], "b": other})
    assert drafts(block) == {"a": alone(long[:60]), "b": alone(other)}


def test_a_rewritten_row_does_not_take_the_budget_of_the_others() -> None:
    drafter, row, short = make(token_budget=64), random_ids(60), random_ids(4, seed=1)
    draft_rows(drafter, {"a": row})
    block = draft_rows(drafter, {"a": random_ids(60, seed=2), "short": short})
    assert block.row(1) == alone(short)


@pytest.mark.parametrize("seed", [2**63, -(2**64), 2**70 + 3])
def test_any_integer_is_a_seed(seed: int) -> None:
    block = draft_rows(make(FixedPolicy(8, 1), sampler=Sampler(0.9)), {"a": random_ids(4)}, seeds={"a": seed})
    assert block.num_draft_tokens == [8]


def test_min_p_counts_for_drafts_too() -> None:
    probs = draft_rows(make(FixedPolicy(8, 1), sampler=Sampler(1.0, min_p=0.5)), {"a": random_ids(4)}).probs
    assert probs is not None
    least = probs.amax(-1, keepdim=True) * 0.5
    assert bool(((probs == 0) | (probs >= least - 1e-12)).all()) and int((probs == 0).sum()) > 0


def test_requests_beyond_the_pool_get_no_drafts_and_are_counted() -> None:
    drafter = make(num_slots=2)
    block = draft_rows(drafter, {name: random_ids(4, seed=i) for i, name in enumerate("abc")})
    assert sorted(block.num_draft_tokens) == [0, 8, 8] and drafter.without_drafts["no room"] == 1
    small = make(num_slots=2, num_tokens=32)
    block = draft_rows(small, {"long": random_ids(40), "short": random_ids(4)})
    assert block.num_draft_tokens == [0, 8] and small.without_drafts["no room"] == 1


@pytest.mark.parametrize("row", [[5, 61], [5, -1], []])
def test_a_row_that_the_drafter_cannot_read_goes_on_without_drafts(row: list[int]) -> None:
    drafter, other = make(), random_ids(4)
    block = draft_rows(drafter, {"odd": row, "fine": other})
    assert drafts(block) == {"odd": [], "fine": alone(other)}
    assert drafter.without_drafts["foreign token"] == 1


def test_a_policy_that_finds_a_first_draft_improbable_keeps_its_request_from_the_denoiser() -> None:
    class Doubtful(AdaptivePolicy):
        def worth_denoising(self, plan: DraftPlan, request_ids: Sequence[Hashable], confidence: Tensor) -> list[bool]:
            assert (confidence > 0).all() and (confidence < 1).all()
            return [one != "a" for one in request_ids]

    rows = {"a": random_ids(4), "b": random_ids(5)}
    drafter, likely = make(Doubtful([8], may_skip=False)), AdaptivePolicy([8], may_skip=False)
    done = drafter.draft([DraftRequest(*row) for row in rows.items()])
    assert drafts(done.block)["a"] == [] and drafts(done.block)["b"] == alone(rows["b"], likely)
    assert done.num_denoised == 1 and done.without_drafts["policy"] == 1


def test_a_request_gets_no_more_drafts_than_it_can_use() -> None:
    drafter = make()
    block = draft_rows(drafter, {"a": random_ids(4), "b": random_ids(5), "c": random_ids(6)}, {"a": 0, "b": 3})
    assert block.num_draft_tokens == [0, 3, 8] and block.token_ids[1].tolist()[3:] == [-1] * 5


def test_released_requests_give_back_their_place() -> None:
    drafter = make(num_slots=1)
    draft_rows(drafter, {"a": random_ids(4)})
    drafter.release("a")
    drafter.release("unknown")
    assert len(drafter.state) == 0
    draft_rows(drafter, {"b": random_ids(4)})
    assert drafter.state.num_evictions == 0


def test_ids_that_the_target_does_not_have_are_never_drafted() -> None:
    row = random_ids(11, vocab_size=30)
    for first_token in ("context", "denoiser"):
        block = draft_rows(make(FixedPolicy(16, 4), first_token=first_token, num_token_ids=30), {"a": row})
        assert max(block.row(0)) < 30
    assert max(alone(row, FixedPolicy(16, 4))) >= 30  # otherwise the test would show nothing


def test_drafting_leaves_torchs_generators_alone() -> None:
    before = torch.random.get_rng_state()
    draft_rows(make(sampler=Sampler(0.9)), {"a": random_ids(5)}, seeds={"a": 3})
    assert torch.equal(torch.random.get_rng_state(), before)


def test_samples_follow_their_seed_and_no_position_shares_noise_between_rounds() -> None:
    row = random_ids(9)
    policy, sampler = FixedPolicy(8, 1), Sampler(2.0)
    blocks = [draft_rows(make(policy, sampler=sampler), {"a": row}, seeds={"a": seed}) for seed in (1, 1, 2)]
    assert blocks[0].row(0) == blocks[1].row(0) != blocks[2].row(0)
    made = blocks[0].provenance
    assert made == Provenance(1, "private", True)
    probs = blocks[0].probs
    assert probs is not None
    torch.testing.assert_close(probs[0].sum(-1), torch.ones(8, dtype=torch.float64))
    assert float(probs[..., tiny_model().config.mask_token_id].max()) == 0


def test_provenance_tells_how_drafts_were_made() -> None:
    row = random_ids(9)
    several = draft_rows(make(FixedPolicy(8, 3), sampler=Sampler(0.8)), {"a": row})
    assert several.provenance == Provenance(3, "private", False) and several.probs is None
    greedy = draft_rows(make(FixedPolicy(8, 1)), {"a": row})
    assert greedy.provenance == Provenance(1, "none", False)
    shared = draft_rows(make(FixedPolicy(8, 1), sampler=Sampler(0.8), noise="shared"), {"a": row})
    assert shared.provenance.noise == "shared"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots 0"),
        ({"token_budget": 0}, "token_budget 0"),
        ({"first_token": "both"}, "first_token 'both'"),
        ({"noise": "loud"}, "noise 'loud'"),
        ({"num_tokens": 0}, "num_tokens 0"),
        ({"num_token_ids": 0}, "num_token_ids 0"),
    ],
)
def test_options_that_are_not_there_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make(**options)


def test_towers_that_go_on_after_the_drafts_are_given_count_as_drafting_not_as_verification() -> None:
    session = make()
    times = PhaseTimes()
    with times.measure("extend", torch.device("cpu")):
        time.sleep(0.02)
    drafted = replace(session.draft([DraftRequest("a", random_ids(5), read_only=True)]), times=times, host_s=0.005)
    outcome = drafted.outcome(RoundResult([0], verify_s=1.0))
    assert outcome.extend_s == times.extend_s
    assert outcome.verify_s == pytest.approx(1.005 - times.extend_s, abs=1e-9)
    on_host = session.draft([DraftRequest("a", random_ids(6))])
    assert on_host.host_s >= on_host.times.total_s > 0
    assert on_host.outcome(RoundResult([0], verify_s=1.0)).verify_s == 1.0
