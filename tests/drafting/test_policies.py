"""Policies: what they commit, when they stop, and what the adaptive one learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.drafting.rounds import draft_rows
from tests.drafting.served_texts import SimulatedServer, rate, serve
from tests.support.builders import random_ids, tiny_model
from twotower_spec import ArgumentError
from twotower_spec.drafting import (
    AdaptivePolicy,
    DraftingSession,
    DraftPlan,
    FixedPolicy,
    RoundOutcome,
    ThresholdPolicy,
)
from twotower_spec.drafting.policies import Candidate, FixedSteps
from twotower_spec.drafting.policies.costs import RoundCosts, TimeTable
from twotower_spec.generation.denoising import DenoisingStep


def step(confidence: list[list[float]], index: int = 0, masked: list[list[int]] | None = None) -> DenoisingStep:
    wide = torch.tensor(confidence)
    blank = torch.ones_like(wide, dtype=torch.bool) if masked is None else torch.tensor(masked).bool()
    return DenoisingStep(index, list(range(len(wide))), blank, wide)


def test_fixed_steps_commit_what_is_confident_and_everything_at_last() -> None:
    rule = FixedSteps(3, 0.8)
    first = step([[0.9, 0.5, 0.85, 0.1], [0.1, 0.3, 0.2, 0.1]])
    assert rule.commits(first).tolist() == [[True, False, True, False], [False, True, False, False]]
    last = step([[0.9, 0.5, 0.85, 0.1]], index=2, masked=[[0, 1, 0, 1]])
    assert rule.commits(last).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_fixed_number_of_steps_is_not_exceeded(num_steps: int) -> None:
    block = draft_rows(
        DraftingSession(tiny_model(), FixedPolicy(16, num_steps)), {"a": random_ids(4), "b": random_ids(9)}
    )
    assert max(block.num_denoiser_passes) == num_steps


def test_the_threshold_policy_drafts_what_the_model_would_write() -> None:
    row = random_ids(12)
    block = draft_rows(DraftingSession(tiny_model(), ThresholdPolicy(8, 5, 0.3), first_token="denoiser"), {"a": row})
    written = tiny_model().generate_mask_diffusion([row], 8, block_size=8, steps_per_block=5, confidence_threshold=0.3)
    assert block.row(0) == written.token_ids[0]
    assert block.num_denoiser_passes == written.num_denoiser_passes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedPolicy(8, 0), "steps_per_block 0"),
        (lambda: FixedPolicy(8, 1, num_tokens=9), "num_tokens 9 is more than block_size 8"),
        (lambda: ThresholdPolicy(8, 8, 1.5), "confidence_threshold 1.5"),
        (lambda: AdaptivePolicy([]), "block_sizes is empty"),
        (lambda: AdaptivePolicy([0]), "block_size 0"),
    ],
)
def test_policies_refuse_what_cannot_be(make: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()  # type: ignore[operator]


class World:
    """Simulated server whose gains and costs by block size an adaptive policy has to find out.

    Args:
        acceptance: chance that a draft is accepted once all before it are, by block size.
        step_s, verify_s: seconds of a denoiser pass, and of a verified token; each verification costs another 10 ms.
    """

    def __init__(self, acceptance: dict[int, float], step_s: float = 0.005, verify_s: float = 0.0) -> None:
        self.acceptance, self.step_s, self.verify_s = acceptance, step_s, verify_s
        self.generator = torch.Generator().manual_seed(0)
        self.backlog = 100  # tokens that the context tower has not read
        self.num_rounds = 0

    def round(self, policy: AdaptivePolicy) -> RoundOutcome:
        self.num_rounds += 1
        text = self.num_rounds // 100
        if not self.num_rounds % 100:  # the next text begins
            self.backlog = 20
        plan = policy.plan(1, [Candidate(text, self.backlog)])
        if plan is not None and (plan.most_context_tokens or self.backlog) < self.backlog:
            most = plan.most_context_tokens
            taken = most, 0.0005 * most, 0.0, 0.01
            outcome = RoundOutcome(plan, [0], [0], torch.zeros(1, 0), [0], *taken, request_ids=[text])
            self.backlog += 1 - most
        elif plan is None:
            self.backlog += 1
            taken = 0, 0.0, 0.0, 0.01 + self.verify_s
            outcome = RoundOutcome(None, [0], [0], torch.zeros(1, 0), [0], *taken, request_ids=[text])
        else:
            outcome = self.drafted(policy, plan, text)
            self.backlog = outcome.num_accepted[0] + 1
        policy.observe(outcome)
        return outcome

    def drafted(self, policy: AdaptivePolicy, plan: DraftPlan, text: int) -> RoundOutcome:
        size = plan.block_size
        confidence = torch.full((1, size), self.acceptance[size])
        masked, passes = torch.ones(1, size, dtype=torch.bool), 0
        while masked.any():
            commits = plan.commit_rule.commits(DenoisingStep(passes, [0], masked, confidence))
            masked, passes = masked & ~commits, passes + 1
        count = policy.usable(plan, confidence, [passes])[0]
        right = torch.rand(count, generator=self.generator) < self.acceptance[size]
        accepted = int(right.int().cumprod(0).sum())
        seconds = 0.01 + self.verify_s * (1 + count)
        extend_s = 0.0005 * self.backlog
        denoise_s = self.step_s * passes
        taken = self.backlog, extend_s, denoise_s, seconds
        return RoundOutcome(plan, [count], [accepted], confidence, [passes], *taken, request_ids=[text])


def sizes(policy: AdaptivePolicy, world: World, num_rounds: int) -> list[int]:
    outcomes = [world.round(policy) for _ in range(num_rounds)]
    return [outcome.plan.block_size if outcome.plan else 0 for outcome in outcomes]


def test_the_adaptive_policy_settles_on_the_block_size_that_pays() -> None:
    chosen = sizes(AdaptivePolicy([4, 8, 16]), World({4: 0.5, 8: 0.9, 16: 0.6}), 600)
    assert set(chosen) == {0, 4, 8, 16}
    assert chosen[200:].count(8) > 0.9 * 400


def test_the_adaptive_policy_drafts_nothing_where_drafting_does_not_pay_and_tries_again() -> None:
    policy = AdaptivePolicy([8])
    useless = World({8: 0.02}, step_s=0.02)
    chosen = sizes(policy, useless, 400)
    assert chosen[100:].count(0) > 0.9 * 300
    useful = sizes(policy, World({8: 0.95}), 4000)
    assert useful[-300:].count(8) > 270


def test_one_slow_round_does_not_spoil_a_block_size() -> None:
    policy, world = AdaptivePolicy([8]), World({8: 0.9})
    usual = world.step_s
    for slow in (3, 12):
        sizes(policy, world, slow)
        world.step_s = 3.0
        sizes(policy, world, 1)
        world.step_s = usual
    assert sizes(policy, world, 300)[100:].count(8) > 180


def test_a_policy_learns_also_when_only_some_requests_are_verified() -> None:
    policy, drafted = AdaptivePolicy([8]), 0
    for _ in range(200):
        plan = policy.plan(5)
        drafted += plan is not None
        counts, confidence = ([8] * 3, torch.full((3, 8), 0.9)) if plan else ([0] * 3, torch.zeros(3, 0))
        accepted = [8 * bool(plan)] * 3
        outcome = RoundOutcome(plan, counts, accepted, confidence, [1] * 3, 9, 0.001, 0.005, 0.01, num_planned=5)
        policy.observe(outcome)
    assert drafted > 180


def test_a_round_that_took_no_time_is_no_error() -> None:
    policy = AdaptivePolicy([8])
    for _ in range(4):
        policy.observe(RoundOutcome(policy.plan(1) and None, [0], [0], torch.zeros(1, 0), [0], 0, 0.0, 0.0, 0.0))
    policy.plan(1)


def test_the_adaptive_policy_always_drafts_when_it_may_not_skip() -> None:
    assert 0 not in sizes(AdaptivePolicy([8], may_skip=False), World({8: 0.02}, step_s=0.02), 100)


def test_the_adaptive_policy_stops_denoising_when_another_step_brings_nothing() -> None:
    policy, world = AdaptivePolicy([8]), World({8: 0.7})
    passes = [world.round(policy).num_denoiser_passes[0] for _ in range(400)]
    assert max(passes) > 1  # it was tried
    assert sum(passes[200:]) < 1.1 * 200


def test_the_adaptive_policy_drafts_fewer_where_verifying_is_dear() -> None:
    cheap, dear = AdaptivePolicy([16], may_skip=False), AdaptivePolicy([16])
    for _ in range(400):
        World({16: 0.8}).round(cheap)
    world = World({16: 0.8}, verify_s=0.004)
    counts = [world.round(dear) for _ in range(400)]
    drafted = [outcome.num_draft_tokens[0] for outcome in counts if any(outcome.num_draft_tokens)]
    assert max(drafted[1:]) < 16  # the first one tells what drafts cost
    assert cheap.usable(cheap_plan(cheap), torch.full((1, 16), 0.8), [1]) == [16]


def cheap_plan(policy: AdaptivePolicy) -> DraftPlan:
    plan = None
    while plan is None:
        plan = policy.plan(1)
    return plan


def test_calibration_learns_what_a_confidence_is_worth() -> None:
    policy = AdaptivePolicy([4], may_skip=False)
    before = policy.calibration.survival(4, [1], torch.full((1, 4), 0.9))
    for _ in range(300):
        plan = cheap_plan(policy)
        outcome = RoundOutcome(plan, [4], [1], torch.full((1, 4), 0.9), [1], 2, 0.0, 0.001, 0.01)
        policy.observe(outcome)
    after = policy.calibration.survival(4, [1], torch.full((1, 4), 0.9))
    assert before[0, 0] == pytest.approx(0.9)
    assert after[0, 0] > 0.95 and after[0, 1] < 0.1


def test_an_adaptive_policy_decides_the_same_on_the_same_rounds() -> None:
    runs = [sizes(AdaptivePolicy(), World({4: 0.5, 8: 0.7, 16: 0.7}), 200) for _ in range(2)]
    assert runs[0] == runs[1]


class Server:
    """Simulated server whose passes cost a fixed time, and more where tokens exceed what it computes at once.

    Args:
        acceptance: chance that a draft is accepted once all before it are.
        free_tokens: tokens of a pass that cost nothing; each further one costs a twentieth of a pass.
    """

    def __init__(self, acceptance: float = 0.85, free_tokens: int = 64) -> None:
        self.acceptance, self.free_tokens = acceptance, free_tokens
        self.generator = torch.Generator().manual_seed(0)

    def seconds(self, num_tokens: int, of_a_pass: float) -> float:
        return of_a_pass * (1 + max(0, num_tokens - self.free_tokens) / 20)

    def round(self, policy: AdaptivePolicy, num_reqs: int) -> tuple[float, float]:
        """Mean number of drafts of a round, and tokens per second."""
        plan = policy.plan(num_reqs)
        counts, accepted, passes, denoise_s = [0] * num_reqs, [0] * num_reqs, 0, 0.0
        confidence = torch.zeros(num_reqs, 0)
        if plan is not None:
            confidence = torch.full((num_reqs, plan.block_size), self.acceptance)
            masked = torch.ones(num_reqs, plan.block_size, dtype=torch.bool)
            while masked.any():
                step = DenoisingStep(passes, list(range(num_reqs)), masked, confidence)
                masked, passes = masked & ~plan.commit_rule.commits(step), passes + 1
            counts = policy.usable(plan, confidence, [passes] * num_reqs)
            right = torch.rand(num_reqs, plan.block_size, generator=self.generator) < self.acceptance
            lengths = right.int().cumprod(1).sum(1).tolist()
            accepted = [min(length, count) for length, count in zip(lengths, counts, strict=True)]
            denoise_s = passes * self.seconds(num_reqs * plan.block_size, 0.003)
        extend_s, verify_s = 0.001 * (plan is not None), self.seconds(sum(counts) + num_reqs, 0.01)
        taken = (num_reqs, extend_s, denoise_s, verify_s)
        policy.observe(RoundOutcome(plan, counts, accepted, confidence, [passes] * num_reqs, *taken))
        return sum(counts) / num_reqs, (sum(accepted) + num_reqs) / (extend_s + denoise_s + verify_s)


def test_under_load_drafting_steps_down_to_nothing_and_comes_back() -> None:
    policy, server = AdaptivePolicy([4, 8, 16]), Server()
    drafts, rates = {}, {}
    for phase, num_reqs in enumerate([1, 12, 64, 12, 1]):  # load rises, and falls again
        rounds = [server.round(policy, num_reqs) for _ in range(400)][150:]
        drafts[phase] = sum(count for count, _ in rounds) / len(rounds)
        rates[phase] = sum(rate for _, rate in rounds) / len(rounds)
    assert drafts[0] > 6 > drafts[1] > drafts[2]
    assert drafts[2] < 0.3  # tried again at times, and nothing else
    assert drafts[3] == pytest.approx(drafts[1], rel=0.3) and drafts[4] > 0.8 * drafts[0]
    without = {num_reqs: num_reqs / server.seconds(num_reqs, 0.01) for num_reqs in (1, 12, 64)}
    assert rates[0] > 3 * without[1] and rates[1] > without[12]
    assert rates[2] > 0.97 * without[64]


def test_reading_long_prompts_for_short_texts_is_charged_to_drafting() -> None:
    """Prompts of 2000 tokens take 0.2 s to read and texts have 16 tokens; a round of drafts brings 3 of them."""
    policy, drafted = AdaptivePolicy([4]), []
    left, backlog, text = 0, 0, 0
    for _ in range(4000):
        if left <= 0:
            left, backlog, text = 16, 2000, text + 1
        plan = policy.plan(1, [Candidate(text, backlog)])
        read = 0 if plan is None else min(backlog, plan.most_context_tokens or backlog)
        if plan is None or read < backlog:
            taken = read, 1e-4 * read, 0.0, 0.01
            policy.observe(RoundOutcome(plan, [0], [0], torch.zeros(1, 0), [0], *taken, request_ids=[text]))
            left, backlog = left - 1, backlog + 1 - read
        else:
            taken = read, 1e-4 * read, 0.005, 0.01
            policy.observe(RoundOutcome(plan, [4], [3], torch.full((1, 4), 0.7), [1], *taken, request_ids=[text]))
            left, backlog = left - 4, 4
        drafted.append(plan is not None)
    assert sum(drafted[1000:]) < 0.1 * 3000


def test_one_long_verification_does_not_make_drafts_dear() -> None:
    policy, counts = AdaptivePolicy([16], may_skip=False), []
    world = World({16: 0.9}, verify_s=0.00005)
    for i in range(600):
        if i == 300:
            plan = policy.plan(1)
            policy.observe(RoundOutcome(plan, [16], [9], torch.full((1, 16), 0.9), [1], 10, 0.001, 0.005, 30.0))
        counts.append(world.round(policy).num_draft_tokens[0])
    assert sum(counts[310:]) / 290 > 0.9 * sum(counts[200:300]) / 100


def test_a_policy_gives_up_where_nobody_ever_gets_drafts() -> None:
    policy, planned = AdaptivePolicy([4, 8]), []
    for _ in range(300):
        plan = policy.plan(2, [Candidate(0, 250), Candidate(1, 250)])
        planned.append(plan is not None)
        extend_s = 0.02 if plan else 0.0
        policy.observe(RoundOutcome(plan, [0, 0], [0, 0], torch.zeros(2, 0), [0, 0], 500, extend_s, 0.0, 0.01))
    assert sum(planned[100:]) < 0.2 * 200


def test_a_block_size_that_was_slow_at_the_start_is_tried_again() -> None:
    policy, world = AdaptivePolicy([4, 8]), World({4: 0.8, 8: 0.9})
    usual = world.step_s
    for i in range(12):  # something else keeps the machine busy during the first rounds of block size 8
        world.step_s = 0.04 if i >= 4 else usual
        world.round(policy)
    world.step_s = usual
    assert sizes(policy, world, 3000)[-300:].count(8) > 0.8 * 300  # looks are a hundredth of the time


def test_one_measurement_of_a_size_may_be_an_accident_and_does_not_count_yet() -> None:
    table = TimeTable()
    for size in (1, 32, 128):
        table.add(size, size / 1000)
    table.add(50, 5.0)
    table.add(100, 0.2)  # slow, but no accident
    assert table.at(50) < 0.1 and table.at(100) == pytest.approx(0.2)
    table.add(50, 5.0)
    table.add(50, 5.0)
    assert table.at(50) == table.over(np.array([50.0])) == 5.0


def test_the_first_measurement_of_all_may_be_an_accident_too() -> None:
    costs = RoundCosts()
    for _ in range(3):
        costs.add_verification(2, 0, 0.01)
    costs.add_verification(2, 16, 5.0)
    assert costs.extra.at(16) == 0.0
    costs.add_verification(2, 16, 0.03)
    assert costs.extra.at(16) == pytest.approx(0.02)


def test_an_outcome_counts_for_the_load_it_was_planned_for_whatever_was_planned_since() -> None:
    policy = AdaptivePolicy([4], most_steps=1)
    nothing = [0, 0]  # of eight requests the target ran two
    outcome = RoundOutcome(None, nothing, nothing, torch.zeros(2, 0), nothing, 0, 0.0, 0.0, 0.02, num_planned=8)
    for planned_between in (1, 2, 8, 30):
        policy.plan(8)
        policy.plan(planned_between)
        policy.observe(outcome)
    assert [n for n in (1, 2, 8, 30) if policy.costs.plain.knows(n)] == [8]


def plain_rounds(policy: AdaptivePolicy, request_ids: list[str], num_unread: int, count: int = 3) -> None:
    for _ in range(count):
        policy.plan(len(request_ids), [Candidate(one, num_unread) for one in request_ids])
        nothing = [0] * len(request_ids)
        outcome = RoundOutcome(None, nothing, nothing, torch.zeros(len(nothing), 0), nothing, 0, 0.0, 0.0, 0.01)
        policy.observe(replace(outcome, request_ids=request_ids))


def test_outcomes_that_arrive_after_a_request_has_ended_leave_nothing_of_it() -> None:
    policy = AdaptivePolicy([4])
    plain_rounds(policy, ["a", "b"], 20)
    policy.forget("a")
    outcome = RoundOutcome(None, [0, 0], [0, 0], torch.zeros(2, 0), [0, 0], 0, 0.0, 0.0, 0.01, request_ids=["a", "b"])
    policy.observe(outcome)
    assert policy.acceptance.num_tokens("a") == 0 and policy.acceptance.num_tokens("b") == 4
    assert policy.acceptance.mean_tokens == pytest.approx(3.5)


def test_looks_come_too_where_a_pass_of_the_context_tower_takes_longer_than_a_step() -> None:
    policy = AdaptivePolicy([4])
    for num_tokens in (1, 256):
        policy.learn_costs(num_tokens, 1, 4, 0.03, 0.03)
    plans = []
    for num_rounds in range(2000):
        text, num_unread = divmod(num_rounds, 100)
        plans.append(policy.plan(1, [Candidate(text, num_unread)]))
        plain = RoundOutcome(None, [0], [0], torch.zeros(1, 0), [0], 0, 0.0, 0.0, 0.01, request_ids=[text])
        told = {text: [False] * 40}
        looked = replace(plain, plan=plans[-1], num_context_tokens=num_unread, extend_s=0.03, foreseen=told)
        policy.observe(looked if plans[-1] else plain)
    assert 2 <= sum(plan is not None for plan in plans) <= 7


def test_a_request_without_anything_unread_can_be_looked_at_where_reading_is_slow() -> None:
    policy = AdaptivePolicy([4])
    policy.learn_costs(1, 1, 4, 0.03, 0.03)
    plain_rounds(policy, ["a"], 0, 2000)


def drafting(policy: AdaptivePolicy, request_ids: list[str], block_size: int = 4) -> DraftPlan:
    """A plan of a policy that knows what rounds take and finds that drafting pays."""
    for num_tokens, num_rows in (1, 1), (64, 2):
        policy.learn_costs(num_tokens, num_rows, block_size, 0.001, 0.001 + 0.001 * num_rows)
    plain_rounds(policy, request_ids, 0)
    plan = policy.plan(len(request_ids), [Candidate(one) for one in request_ids])
    assert plan is not None
    return plan


def drafted(plan: DraftPlan, request_ids: list[str], counts: list[int], accepted: list[int]) -> RoundOutcome:
    num_reqs = len(request_ids)
    confidence, passes = torch.full((num_reqs, max(4, *counts)), 0.5), [int(count > 0) for count in counts]
    return RoundOutcome(plan, counts, accepted, confidence, passes, 4, 0.001, 0.002, 0.011, request_ids=request_ids)


def test_a_request_whose_next_token_is_improbable_is_not_denoised_and_counts_as_rejected() -> None:
    policy = AdaptivePolicy([4])
    plan = drafting(policy, ["a", "b"])
    first = torch.tensor([0.95, 0.05])
    for confidence, num_accepted in (0.95, 4), (0.05, 0):
        for _ in range(8):
            policy.calibration.observe(4, 1, np.full(4, confidence), 4, num_accepted)
    assert policy.worth_denoising(plan, ["a", "b"], first) == [True, False]
    policy.observe(drafted(plan, ["a", "b"], [4, 0], [4, 0]))
    assert policy.acceptance.factor("b") > 1.5 * policy.acceptance.factor("a")
    assert policy.worth_denoising(plan, ["a", "b"], torch.tensor([0.05, 0.05])) == [False, False]


def test_drafts_that_the_target_did_not_look_at_are_no_rejections() -> None:
    factors = {}
    for num_given in ([], [4]):
        policy = AdaptivePolicy([4])
        plan = drafting(policy, ["a"])
        policy.observe(replace(drafted(plan, ["a"], [2], [2]), num_given=num_given))
        factors[len(num_given)] = policy.acceptance.factor("a")
    assert factors[1] < factors[0]


def test_a_request_that_cannot_be_read_keeps_nobody_else_from_drafts() -> None:
    policy = AdaptivePolicy([4])
    plan, rows = drafting(policy, ["a", "b"]), []
    for _ in range(420):
        refused = [one for row, one in enumerate("ab") if plan.chooses(row) and one == "a"]
        counts = [0, 4 * plan.chooses(1)]
        policy.observe(replace(drafted(plan, ["a", "b"], counts, counts), refused=refused))
        next_plan = policy.plan(2, [Candidate("a"), Candidate("b")])
        plan = next_plan or replace(plan, rows=frozenset())
        rows.append(plan.rows)
    assert rows[5] == {1}  # without a it is b's turn
    assert 1 <= sum(0 in (chosen or ()) for chosen in rows) <= 4  # and a is tried again now and then


def test_one_in_twenty_improbable_blocks_is_denoised_all_the_same() -> None:
    policy = AdaptivePolicy([4])
    plan = drafting(policy, ["a"])
    worth = [policy.worth_denoising(plan, ["a"], torch.tensor([0.02]))[0] for _ in range(60)]
    assert worth.count(True) == 3


def test_an_unlucky_beginning_keeps_no_confidence_from_being_denoised() -> None:
    """A first draft that is right as often as its confidence says, whose like were wrong four times."""
    policy, generator = AdaptivePolicy([4]), np.random.default_rng(0)
    plan = drafting(policy, ["a"])
    for _ in range(4):
        policy.calibration.observe(4, 1, np.full(4, 0.6), 4, 0)
    kept = []
    for _ in range(600):
        kept.append(policy.worth_denoising(plan, ["a"], torch.tensor([0.6]))[0])
        if kept[-1]:
            policy.calibration.observe(4, 1, np.full(4, 0.6), 4, 4 * int(generator.random() < 0.6))
    assert sum(kept[-200:]) > 150


def test_text_that_is_always_guessed_is_not_left_with_the_smallest_block() -> None:
    policy, server = AdaptivePolicy(), SimulatedServer()
    server.warm_up(policy)
    serve(policy, server, [1.0], 300)
    assert rate(serve(policy, server, [1.0], 300)) > 0.9 * server.best_fixed_rate([1.0], policy.block_sizes)


def test_a_block_ends_where_the_request_does_also_before_it_is_denoised() -> None:
    policy = AdaptivePolicy([16])
    plan, first = drafting(policy, ["a"], 16), torch.tensor([0.2])
    assert policy.worth_denoising(plan, ["a"], first) == [True]
    assert policy.worth_denoising(replace(plan, limits={"a": 1}), ["a"], first) == [False]


def test_looks_have_no_drafts_where_those_would_be_of_the_whole_batch() -> None:
    """Which an asynchronous scheduler plans a step or two before it is known that a look is over."""
    policy = AdaptivePolicy([4])
    for num_tokens in (1, 64):
        policy.learn_costs(num_tokens, 4, 4, 0.001, 0.03)
    plain_rounds(policy, list("abcd"), 0)
    planned = []
    for num_rounds in range(3000):
        names = [(name, num_rounds // 40) for name in "abcd"]
        if not num_rounds % 40:
            for name in "abcd":
                policy.forget((name, num_rounds // 40 - 1))
        plan = policy.plan(4, [Candidate(name, num_rounds % 40) for name in names], whole_batch=True)
        planned.append(plan.num_tokens if plan else 0)
        zeros = [0] * 4
        nothing = RoundOutcome(None, zeros, zeros, torch.zeros(4, 0), zeros, 0, 0.0, 0.0, 0.01, request_ids=names)
        policy.observe(nothing)
    assert not any(planned)
