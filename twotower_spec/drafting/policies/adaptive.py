"""The policy that knows before a round what it costs and what it is expected to bring."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import numpy as np
from torch import Tensor

from twotower_spec.config import check_integer, check_schedule
from twotower_spec.drafting.policies.acceptance import MEMORY, Acceptance, Calibration
from twotower_spec.drafting.policies.choice import Choice, Chooser, Load
from twotower_spec.drafting.policies.costs import RoundCosts
from twotower_spec.drafting.policies.looks import Look, LookBudget, most_telling
from twotower_spec.drafting.policies.policy import MOST_COMPARED, Candidate, DraftPlan, RoundOutcome
from twotower_spec.drafting.policies.steps import AdaptiveSteps, Prices, StepGains
from twotower_spec.errors import ArgumentError

# What halving or doubling constants of the policy does is in docs/drafting.md.

# What one round may take longer for a look, and for contexts that lag behind when drafting begins to pay, in plain
# steps; and fewest tokens that are read on.
LONGEST_LOOK, LONGEST_CATCH_UP, LEAST_CHUNK = 0.75, 2.0, 16
# Begins to draft for a rate of so many times that of no drafts, and goes on with what it does for one of so many times
# that of anything else: contexts that were read for nothing are lost, and what is given up by mistake comes back with a
# look only. With 1.05 the trio's eight at once began for gains that were none: 0.93 times the speed of no drafts, and
# 0.96 with 1.1 (docs/benchmarks.md).
BEGIN, STAY = 1.1, 0.97
# Rounds of one kind after which another one refreshes its times, no drafts or the other block sizes in turn, and for
# which a request is left alone whose context could not be read; and rounds without drafts after which a look drafts.
REFRESH, STALE = 200, 1000
# Rounds for which the outcome of a look is waited for, where rounds are planned before the last one is known.
MOST_AWAITED = 3
# One of so many blocks that are not denoised, because their first draft is improbable, is denoised all the same.
TRIED_OF_UNLIKELY = 20
# Rounds that are left out where nothing pays: a round without drafts takes the host 0.3 ms in vLLM.
RESTS = 3
# Choices are weighed anew once in so many rounds of the same requests: it takes a third of a millisecond.
REWEIGH = 8


class AdaptivePolicy:
    """Drafts as much as pays by known costs and chances, for every request apart; nothing where nothing pays.

    Costs are measured by the warm-up and by the rounds that happen anyway; chances are each request's own record, and
    that of all others. After the decision a block is denoised while another step is worth its time, and as many drafts
    are verified as are worth it. Use it when load, text or verifier vary, or nobody wants to tune.

    Args:
        block_sizes: that may be denoised.
        most_steps: of a block.
        confidence_threshold: what is above it is committed before the last step.
        may_skip: whether a round may draft nothing.

    Raises:
        ArgumentError: a value is out of range.
    """

    def __init__(
        self,
        block_sizes: Sequence[int] = (4, 8, 16),
        most_steps: int = 16,
        confidence_threshold: float = 0.8,
        may_skip: bool = True,
    ) -> None:
        if not block_sizes:
            raise ArgumentError("block_sizes is empty; give at least one, [8] for instance")
        for size in block_sizes:
            check_schedule(size, most_steps, confidence_threshold)
        check_integer("most_steps", most_steps, minimum=1)
        self.block_sizes, self.most_steps, self.threshold = tuple(block_sizes), most_steps, confidence_threshold
        self.num_speculative_tokens = max(block_sizes)
        self.selects_drafts = self.learns_from_reading = True
        self.may_skip, self.num_rests = may_skip, 0
        self.costs, self.acceptance = RoundCosts(), Acceptance(block_sizes)
        self.calibration, self._gains = Calibration(block_sizes), StepGains()
        self._chooser, self._budget = Chooser(self.costs, self.acceptance), LookBudget()
        self._loads: dict[int, Load] = defaultdict(Load)
        self._weighed: tuple[object, tuple[float, Mapping[int, Choice]]] = None, (0.0, {})
        self._look: Look | None = None
        # Rounds since blocks were denoised, all rounds, and blocks that were found unlikely since one was tried.
        self._num_undrafted = self._num_rounds = self._num_unlikely = 0
        # The round from which a request that was refused is planned for again.
        self._refused: dict[Hashable, int] = {}

    def plan(
        self, num_reqs: int, candidates: Sequence[Candidate] = (), *, whole_batch: bool = False
    ) -> DraftPlan | None:
        """See `DraftPolicy.plan`."""
        candidates, self.num_rests = candidates or [Candidate(row) for row in range(num_reqs)], 0
        self.acceptance.begin(one.request_id for one in candidates)
        rows = [
            row
            for row, one in enumerate(candidates)
            if one.max_draft_tokens != 0 and self._refused.get(one.request_id, 0) <= self._num_rounds
        ]
        if not rows or (self.may_skip and not self.costs.plain.knows(num_reqs)):
            return None
        load, plain_s = self._load(num_reqs), self.costs.plain.at(num_reqs)
        plain_rate, choices = self._choices(num_reqs, candidates, rows, load, whole_batch)
        best = max(choices.values(), key=lambda one: one.rate / (STAY if one.block_size == load.block_size else 1.0))
        pays = best.rate > plain_rate * (STAY if load.block_size else BEGIN)
        if not pays and self.may_skip:
            price = choices[min(self.block_sizes)].token_price
            look = self._look_at_one(num_reqs, candidates, rows, plain_s, price, whole_batch)
            self.num_rests = 0 if look else RESTS
            return look
        self._look = None
        if load.num_same >= REFRESH and (load.block_size or not self.may_skip):
            others = [size for size in (0, *self.block_sizes) if size != load.block_size and (size or self.may_skip)]
            size = others[load.num_refreshed % len(others)] if others else best.block_size
            load.num_same, load.num_refreshed, load.refreshing = 0, load.num_refreshed + 1, size
            if not size:
                return None
            best = choices[size]
        elif new := [size for size in self.block_sizes if self.acceptance.is_new(size)]:
            best = choices[new[0]]
        may_try = self._budget.affords(self.costs.denoise(best.block_size).at(len(best.rows)), plain_s)
        if not self.may_skip:
            return self._plan(best, candidates, rows, None, whole_batch, may_try)
        chunk = self._chunk(LONGEST_CATCH_UP * max(plain_s, best.steady_s))
        return self._plan(best, candidates, best.rows, chunk, whole_batch, may_try)

    def learn_costs(self, num_tokens: int, num_rows: int, block_size: int, extend_s: float, denoise_s: float) -> None:
        """See `DraftPolicy.learn_costs`."""
        if num_tokens:
            self.costs.extend.add(num_tokens, extend_s)
        self.costs.denoise(block_size).add(num_rows, denoise_s)

    def worth_denoising(self, plan: DraftPlan, request_ids: Sequence[Hashable], confidence: Tensor) -> list[bool]:
        """See `DraftPolicy.worth_denoising`."""
        rule, size = plan.commit_rule, plan.block_size
        assert isinstance(rule, AdaptiveSteps)
        if not self.may_skip or rule.look or math.isinf(rule.prices.second):
            return [True] * len(request_ids)
        first = self.calibration.first(size, confidence.double().cpu().numpy())
        limits = [plan.limits.get(one, plan.num_tokens) for one in request_ids]
        worth = self._chooser.worth_denoising(size, request_ids, first, limits, rule.prices.second)
        self._num_unlikely += worth.count(False)
        if self._num_unlikely >= TRIED_OF_UNLIKELY:  # or it would never be known whether they still are
            self._num_unlikely = 0
            return [True] * len(worth)
        rule.unlikely = frozenset(one for one, is_worth in zip(request_ids, worth, strict=True) if not is_worth)
        return worth

    def usable(self, plan: DraftPlan, confidence: Tensor, num_denoiser_passes: Sequence[int]) -> list[int]:
        """See `DraftPolicy.usable`."""
        rule = plan.commit_rule
        assert isinstance(rule, AdaptiveSteps)
        survival = self.calibration.survival(plan.block_size, num_denoiser_passes, confidence)
        worth = survival > rule.prices.token
        worth[:, 0] = True  # a round that was denoised drafts something, or it could never learn
        counts: list[int] = np.where(worth.all(axis=1), worth.shape[1], worth.argmin(axis=1)).tolist()
        return counts

    def observe(self, outcome: RoundOutcome) -> None:
        """See `DraftPolicy.observe`."""
        num_ran = len(outcome.num_accepted)
        if not num_ran:
            return
        # After rounds that were left out there may be fewer than it was planned for.
        num_reqs, plan = num_ran if outcome.num_rested else outcome.num_planned or num_ran, outcome.plan
        load, rule = self._load(num_reqs), plan.commit_rule if plan else None
        tried, look = (rule.num_tried, rule.look) if isinstance(rule, AdaptiveSteps) else (0, None)
        unlikely = rule.unlikely if isinstance(rule, AdaptiveSteps) else frozenset()
        self._learn_costs_of(outcome, num_reqs, load, tried, len(unlikely))
        self._learn_chances_of(outcome, outcome.request_ids or range(num_ran), unlikely)
        drafting_s = outcome.extend_s + outcome.denoise_s + outcome.host_s
        if look:
            spent_s = drafting_s + max(0.0, outcome.verify_s - self.costs.plain.at(num_reqs))
            expected_s, has_read = look.expected_s, outcome.num_context_tokens > 1
            if look.is_over(spent_s, bool(outcome.foreseen), has_read, any(outcome.num_draft_tokens)):
                self._look = None if self._look is look else self._look
        else:  # a step that was taken to learn is a look too
            spent_s = outcome.denoise_s * tried / max(1, *outcome.num_denoiser_passes)
            expected_s = self.costs.denoise(plan.block_size).at(num_ran) if plan else 0.0
        num_rounds = 1 + outcome.num_rested
        self._num_rounds += num_rounds
        here = (one for one in outcome.refused if one in self.acceptance)
        self._refused.update(dict.fromkeys(here, self._num_rounds + REFRESH))
        self._budget.add(spent_s, expected_s, outcome.verify_s * num_rounds + drafting_s, num_rounds)
        size = plan.block_size if plan and not look else 0
        if load.refreshing == size != load.block_size:
            load.refreshing = None
            return
        load.num_same = load.num_same + num_rounds if size == load.block_size else 0
        load.block_size = size

    def forget(self, request_id: Hashable) -> None:
        """See `DraftPolicy.forget`."""
        self.acceptance.forget(request_id)
        self._refused.pop(request_id, None)

    def _learn_costs_of(
        self, outcome: RoundOutcome, num_reqs: int, load: Load, num_tried: int, num_unlikely: int
    ) -> None:
        """Corrects what is known of times by a round that happened."""
        costs, plan = self.costs, outcome.plan
        num_drafts = sum(outcome.num_draft_tokens)
        if num_drafts and plan and plan.whole_batch:
            num_drafts = num_reqs * plan.num_tokens
        if not outcome.with_prompts:
            costs.add_verification(num_reqs, num_drafts, outcome.verify_s)
        if outcome.num_context_tokens:
            costs.extend.add(outcome.num_context_tokens, outcome.extend_s)
        passes = max(outcome.num_denoiser_passes, default=0)
        num_drafted = sum(count > 0 for count in outcome.num_denoiser_passes)
        self._num_undrafted = 0 if passes else self._num_undrafted + 1 + outcome.num_rested
        if plan is None:
            return
        if passes:
            num_rows = outcome.num_denoised or num_drafted
            costs.denoise(plan.block_size).add(num_rows, outcome.denoise_s / passes)
            costs.host.add(num_rows, outcome.host_s, usual=outcome.verify_s)
            load.passes[plan.block_size] += (1 - MEMORY) * (passes - num_tried - load.passes[plan.block_size])
        if passes or num_unlikely:
            load.share_denoised += (1 - MEMORY) * (bool(passes) - load.share_denoised)
        if plan.rows and plan.num_tokens:
            share = min(1.0, (num_drafted + num_unlikely) / len(plan.rows))
            if share and not load.block_size:  # drafting begins
                load.share_drafted = 1.0
            load.share_drafted += (1 - MEMORY) * (share - load.share_drafted)

    def _learn_chances_of(
        self, outcome: RoundOutcome, request_ids: Sequence[Hashable], unlikely: Collection[Hashable]
    ) -> None:
        """Learns from drafts that were verified or not worth it, and from tokens that were read late."""
        for request_id, foreseen in outcome.foreseen.items():
            self.acceptance.observe_reading(request_id, foreseen)
        for request_id in unlikely:
            assert outcome.plan is not None
            self.acceptance.observe_block(request_id, outcome.plan.block_size, 0, is_limited=False)
        if outcome.plan is not None and any(outcome.num_draft_tokens):
            size, confidence = outcome.plan.block_size, outcome.confidence.double().numpy()
            given = outcome.num_given or outcome.num_draft_tokens
            counts = zip(request_ids, given, outcome.num_draft_tokens, outcome.num_accepted, strict=True)
            for row, (request_id, most_drafted, drafted, accepted) in enumerate(counts):
                if drafted:
                    most = outcome.plan.limits.get(request_id, outcome.plan.num_tokens)
                    is_limited = accepted >= most or accepted == drafted < most_drafted
                    self.acceptance.observe_block(request_id, size, accepted, is_limited)
                    self.calibration.observe(size, outcome.num_denoiser_passes[row], confidence[row], drafted, accepted)
        num_new = [count + 1 + outcome.num_rested for count in outcome.num_accepted]
        self.acceptance.end_rounds(request_ids, num_new, 1 + outcome.num_rested)

    def _load(self, num_reqs: int) -> Load:
        """Batches of about one size, by powers of two."""
        return self._loads[max(num_reqs, 1).bit_length()]

    def _choices(
        self, num_reqs: int, candidates: Sequence[Candidate], rows: Sequence[int], load: Load, whole_batch: bool
    ) -> tuple[float, Mapping[int, Choice]]:
        """Weighs all block sizes; where the requests stay the same they are weighed anew every few rounds only.

        That is when something was learnt of them, or drafting has begun a moment ago.

        Returns:
            Tokens per second without drafts, by the same costs; and the choices.
        """
        learnt = self.acceptance.num_observed, load.num_same // REWEIGH
        if load.block_size and load.num_same >= REWEIGH:
            learnt = 0, load.num_same // REWEIGH
        key = num_reqs, load.block_size, learnt, whole_batch, tuple((candidates[row].request_id, row) for row in rows)
        if self._weighed[0] != key:
            choose = self._chooser.choose_for_all if whole_batch else self._chooser.choose
            choices = {size: choose(size, num_reqs, candidates, rows, load) for size in self.block_sizes}
            self._weighed = key, (self._chooser.plain_rate(num_reqs), choices)
        return self._weighed[1]

    def _look_at_one(
        self,
        num_reqs: int,
        candidates: Sequence[Candidate],
        rows: Sequence[int],
        plain_s: float,
        token_price: float,
        whole_batch: bool,
    ) -> DraftPlan | None:
        """Has one request read, or drafts for one that is, if looks have not taken their share of the time."""
        look, size = self._look, min(self.block_sizes)
        row = None if look is None else next((r for r in rows if candidates[r].request_id == look.request_id), None)
        if row is not None and look is not None and look.num_awaited:
            look.num_awaited -= 1
            return None
        if row is None or look is None:
            least_s = self.costs.extend.at(1)
            if not self._budget.affords(least_s, plain_s):
                self._budget.wants(least_s)
                return None
            row = most_telling(self.acceptance, candidates, rows)
            # Drafts of a whole batch are planned before it is known whether it is to have any: too many for a look.
            drafts = not whole_batch and (row is None or self._num_undrafted >= STALE)
            if row is None:  # nobody lags behind far enough to be read
                row = min(rows, key=self._by_what_is_known(candidates))
                if whole_batch or candidates[row].num_unread > self.num_speculative_tokens:
                    return None
            look_s = self.costs.extend.at(candidates[row].num_unread)
            if drafts:
                drafting_s = self.costs.denoise(size).at(1) + self.costs.host.at(1) + self.costs.extra.at(size)
                look_s += min(drafting_s, 2 * plain_s)  # what was measured last may have been an accident
            self._budget.wants(look_s)
            if not self._budget.affords(look_s, plain_s):
                return None
            look = self._look = Look(candidates[row].request_id, size if drafts else 0, look_s)
        unread = candidates[row].num_unread
        chunk = min(self._chunk(LONGEST_LOOK * plain_s, unread) or MOST_COMPARED, MOST_COMPARED)
        if unread > chunk:  # in pieces of one length: the last one tells most
            chunk = -(-unread // -(-unread // chunk))
        look.num_awaited = MOST_AWAITED
        choice = Choice(size, [row], look.num_tokens, token_price=token_price)
        return self._plan(choice, candidates, [row], chunk, whole_batch, look=look)

    def _by_what_is_known(self, candidates: Sequence[Candidate]) -> Callable[[int], tuple[int, bool]]:
        """Orders rows: the shortest to read first, and those of which nothing was seen."""
        return lambda row: (candidates[row].num_unread, self.acceptance.is_known(candidates[row].request_id))

    def _chunk(self, seconds: float, num_unread: float = math.inf) -> int | None:
        """Most tokens that the context tower reads in some time; None where that is no limit."""
        first_s = self.costs.extend.at(1)
        token_s = (self.costs.extend.at(256) - first_s) / 255
        chunk = (seconds - first_s) / token_s if token_s > 0 else math.inf
        return None if chunk >= min(num_unread, 1 << 20) else max(LEAST_CHUNK, int(chunk))

    def _plan(
        self,
        choice: Choice,
        candidates: Sequence[Candidate],
        rows: Sequence[int],
        most_context_tokens: int | None,
        whole_batch: bool,
        may_try: bool = False,
        look: Look | None = None,
    ) -> DraftPlan:
        size = choice.block_size
        step_s = self.costs.denoise(size).at(len(rows))
        prices = Prices(choice.token_price, choice.rate, choice.rate * step_s if step_s else math.inf, may_try)
        rule = AdaptiveSteps(self.calibration, self._gains, size, self.most_steps, self.threshold, prices, look)
        limits = {
            one.request_id: one.max_draft_tokens
            for one in (candidates[row] for row in rows)
            if one.max_draft_tokens is not None and one.max_draft_tokens < choice.num_tokens
        }
        return DraftPlan(size, choice.num_tokens, rule, frozenset(rows), most_context_tokens, limits, whole_batch)
