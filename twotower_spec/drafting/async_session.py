"""AsyncSession: drafts for a target that schedules asynchronously, whose results the host learns a step later."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower_spec.drafting.draft_block import DraftBlock
from twotower_spec.drafting.policies import Candidate, DraftPlan
from twotower_spec.drafting.policies.fixed import FixedSteps
from twotower_spec.drafting.round import DraftRequest, Round
from twotower_spec.drafting.session import DraftingSession, foreseen_tokens
from twotower_spec.generation.denoising import DenoisedBlocks, Schedule, ScheduleLoop
from twotower_spec.generation.phase_times import PhaseTimes
from twotower_spec.generation.sampling import signed_seed
from twotower_spec.state.context_state import RequestEntry, RequestId, take_within_budget
from twotower_spec.state.token_history import TokenSequence, all_below, tokens_from
from twotower_spec.state.transfer import HostCopy, moved
from twotower_spec.state.window import TokenTable, WindowRows
from twotower_spec.towers.model import TwoTowers


class AsyncRequest(NamedTuple):
    """One request of a step whose result is on its way.

    Attributes:
        request_id: names the request over all rounds.
        row: of the token table.
        token_ids: those that the host knows, from the first one on.
        most_tokens: it has no more than so many by now.
        read_only: the target is still reading its prompt, all of which the host knows.
        wants_drafts: whether drafts are of any use.
    """

    request_id: RequestId
    row: int
    token_ids: TokenSequence
    most_tokens: int
    read_only: bool = False
    wants_drafts: bool = True


@dataclass
class AsyncRound:
    """Drafts on the device, and what the host is to learn of them later.

    Attributes:
        request_ids: of the step, in the order given.
        plan: what the round drafts; None for nothing.
        num_planned: drafts of a request that the policy would have made, whatever the target takes.
        rows: which of the requests were drafted for.
        token_ids: int64 [num_drafted, num_tokens] on the denoiser's device; None where nothing was drafted.
        usable: bool [num_drafted, 1] there: the context is up to date, and the drafts are finite.
        entries: the pool's bookkeeping of the requests that were drafted for.
        copy: of the drafts, their confidence, passes, and how far contexts came.
        read: tokens that the host knew and the context tower read, by request.
        picks: those that it would have picked behind them, on their way, where the round was planned to read alone.
        times, host_s, without_drafts, refused: as of `Round`.
    """

    request_ids: tuple[RequestId, ...]
    plan: DraftPlan | None
    num_planned: int = 0
    rows: list[int] = field(default_factory=list)
    token_ids: Tensor | None = None
    usable: Tensor | None = None
    entries: list[RequestEntry] = field(default_factory=list)
    copy: HostCopy | None = None
    read: Mapping[RequestId, TokenSequence] = field(default_factory=dict)
    picks: HostCopy | None = None
    times: PhaseTimes = field(default_factory=PhaseTimes)
    host_s: float = 0.0
    without_drafts: Counter[str] = field(default_factory=Counter)
    refused: dict[RequestId, str] = field(default_factory=dict)

    @property
    def landed(self) -> bool:
        """Whether `AsyncSession.settle` waits for nothing."""
        return all(copy is None or copy.landed for copy in (self.copy, self.picks)) and self.times.known


class AsyncSession(DraftingSession):
    """Drafts from token ids that are on the device, of which the host knows a beginning alone.

    Prompts, which the host knows, are read as `DraftingSession` reads them. From then on contexts follow the target in
    windows of fixed shape. Nothing of a round is read back before it is over: `draft_ahead` gives drafts on the device,
    and `settle` tells the host about them later.
    """

    scratch = True

    def __init__(self, towers: TwoTowers, *args: Any, most_per_step: int, **options: Any) -> None:
        """Allocates the state.

        Args:
            towers: the model, each tower where it was placed.
            args, options: as of `DraftingSession`.
            most_per_step: tokens that the target commits at most for one request in a step.

        Raises:
            ArgumentError: see `DraftingSession`.
        """
        super().__init__(towers, *args, **options, loop=ScheduleLoop, most_per_step=most_per_step)
        # Rounds under way: how far they bring contexts is not known to the host.
        self._unsettled: list[AsyncRound] = []

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs both towers, windows too; see `DraftingRounds.warm_up`."""
        super().warm_up()
        num_tokens = self._windows.width + 1
        device = self._windows.device
        tokens, length = torch.zeros(1, num_tokens, dtype=torch.int32), torch.tensor([num_tokens], dtype=torch.int32)
        trial = AsyncRequest(object(), 0, [0], num_tokens)
        try:
            self.draft_ahead([trial], TokenTable(tokens.to(device), length.to(device)))
        finally:
            self._unsettled.clear()
            self.release(trial.request_id)

    def reset(self) -> None:
        """Forgets all requests; see `DraftingRounds.reset`."""
        super().reset()
        self._unsettled.clear()

    @torch.inference_mode()
    def draft_ahead(
        self, requests: Sequence[AsyncRequest], table: TokenTable, most_tokens: int | None = None
    ) -> AsyncRound:
        """Drafts what may follow every request, while the host reads nothing from the device.

        Args:
            requests: of the step, each named once.
            table: all of their tokens, on the context tower's device.
            most_tokens: drafts of a request that the target is going to verify; with 0 contexts stay where they are
                too, unless the plan is to read. None for all that the policy makes.

        Returns:
            The round; `settle` takes it when it has landed.
        """
        start = time.perf_counter()
        candidates = [
            Candidate(one.request_id, self._num_unread(one.request_id, one.most_tokens), None if drafts else 0)
            for one in requests
            for drafts in [one.wants_drafts and not one.read_only]
        ]
        plan = self.policy.plan(len(requests), candidates, whole_batch=True) if requests else None
        num_planned = plan.num_tokens if plan else 0
        if plan is not None and most_tokens is not None and most_tokens < plan.num_tokens:
            plan = replace(plan, num_tokens=most_tokens) if most_tokens else None
        done = AsyncRound(tuple(one.request_id for one in requests), plan, num_planned)
        if plan is None:
            done.without_drafts["policy"] = len(requests)
            return done
        chosen = [one for row, one in enumerate(requests) if plan.chooses(row)]
        done.without_drafts["policy"] = len(requests) - len(chosen)
        with done.times.measure("extend", self.towers.context.device):
            following = self._read_known(self._fitting(chosen, done), done)
            if not plan.num_tokens:
                following = []
            if following:
                rows = self._windows.rows([one.request_id for one in following], [one.row for one in following])
                logits, num_new = self._windows.extend(self.towers.context, rows, table)
                self.drafter.keep_logits(rows.slots, logits, num_new > 0)
        if following:
            place = {request_id: row for row, request_id in enumerate(done.request_ids)}
            done.rows = [place[one.request_id] for one in following]
            done.entries = [self.state.entry(one.request_id) for one in following]
            with done.times.measure("denoise", self.towers.denoiser.device):
                self._denoise_ahead(plan, rows, table, num_new, done)
            self._unsettled.append(done)
        done.host_s = time.perf_counter() - start
        return done

    def settle(self, done: AsyncRound, token_ids: Mapping[RequestId, TokenSequence]) -> Round:
        """Takes over what became of a round.

        Args:
            done: rounds are settled in the order in which they were drafted.
            token_ids: known by now, of its requests that are still there; all that they had in that round.

        Returns:
            The round on the host, for `observe`; all drafts of a request count, for none was kept back.
        """
        num_read = sum(map(len, done.read.values()))
        if done.copy is None or done.plan is None:
            block, foreseen = DraftBlock.empty(done.request_ids), {}
            if done.picks is not None:
                foreseen = foreseen_tokens(done.read, done.picks.read()[0].tolist(), done.read)
            return self._settled(done, block, num_read, foreseen=foreseen)
        self._unsettled = [one for one in self._unsettled if one is not done]
        tokens, confidence, numbers = done.copy.read()
        num_passes, computed, num_new, is_current = numbers.unbind()
        drafted = [
            DraftRequest(done.request_ids[row], (), done.plan.num_tokens * current)
            for row, current in zip(done.rows, is_current.tolist(), strict=True)
        ]
        held = [one for one, entry in zip(drafted, done.entries, strict=True) if self._holds(one.request_id, entry)]
        for one, entry, length in zip(drafted, done.entries, computed.tolist(), strict=True):
            if one in held and one.request_id in token_ids:
                new = tokens_from(token_ids[one.request_id][:length], len(entry.history))
                if all_below(new, self.towers.config.vocab_size):
                    entry.history.extend(new)
                else:  # what was read in place of it is of no use; `_fitting` sees the token from now on
                    self.release(one.request_id)
        followed = {one.request_id: count for one, count in zip(drafted, num_new.tolist(), strict=True) if count}
        block, damaged = self._as_block(
            done.plan,
            done.request_ids,
            drafted,
            {*done.read, *followed},
            DenoisedBlocks(tokens, confidence, num_passes),
            selects=False,
        )
        self._note_damage(held, [one.request_id for one in held if one.request_id in damaged])
        done.without_drafts["not finite"] += len(damaged)
        done.without_drafts["prefilling"] += sum(not one.max_draft_tokens for one in drafted)
        num_read += sum(followed.values())
        return self._settled(done, block, num_read, num_denoised=len(drafted), num_damaged=len(damaged))

    def _settled(self, done: AsyncRound, block: DraftBlock, num_read: int, **facts: Any) -> Round:
        """The round on the host, counted; `facts` are further attributes of `Round`."""
        known = done.plan, num_read, done.times, done.host_s, done.without_drafts
        return self._counted(Round(block, *known, refused=done.refused, **facts))

    def _holds(self, request_id: RequestId, entry: RequestEntry) -> bool:
        """Whether a request has the state that it had, not another one since."""
        return request_id in self.state and self.state.entry(request_id) is entry

    def _fitting(self, requests: Sequence[AsyncRequest], done: AsyncRound) -> list[AsyncRequest]:
        """Claims room for the requests that fit into the pool together, those with the fewest new tokens first."""
        state, without_drafts = self.state, done.without_drafts
        wanting = [one for one in requests if one.read_only or one.wants_drafts]
        trusted = [one for one in wanting if not self._rests(one.request_id)]
        without_drafts["limit"] += len(requests) - len(wanting)
        without_drafts["not finite"] += len(wanting) - len(trusted)
        fitting: dict[RequestId, AsyncRequest] = {}
        num_pages = 0
        for one in sorted(trusted, key=lambda one: one.most_tokens - state.num_computed_tokens(one.request_id)):
            needed = state.pages_for(one.most_tokens)
            if one.request_id in state:
                needed = max(needed, state.num_pages_of(one.request_id))
            new = one.token_ids[state.num_computed_tokens(one.request_id) :]
            if len(fitting) >= state.num_slots or num_pages + needed > state.num_pages:
                done.refused[one.request_id] = "no room"
            elif not all_below(new, self.towers.config.vocab_size):
                done.refused[one.request_id] = "foreign token"
            else:
                fitting[one.request_id] = one
                num_pages += needed
        without_drafts.update(done.refused.values())
        for one in fitting.values():
            state.claim(one.request_id, one.most_tokens, keep=list(fitting))
        return list(fitting.values())

    def _read_known(self, fitting: Sequence[AsyncRequest], done: AsyncRound) -> list[AsyncRequest]:
        """Reads what the host knows and windows do not follow yet, prompts above all; gives requests to follow."""
        state = self.state
        under_way = {id(entry) for one in self._unsettled for entry in one.entries}
        new: dict[RequestId, TokenSequence] = {}
        for one in fitting:
            entry = state.entry(one.request_id)
            if id(entry) not in under_way and len(entry.history) < len(one.token_ids):
                new[one.request_id] = one.token_ids[len(entry.history) :]
        most = done.plan.most_context_tokens if done.plan else None
        budget = self._admission.token_budget
        increments = take_within_budget(new, budget if most is None else min(budget, most))
        if increments:
            logits, picks = self._extend(increments, compares=done.plan is not None and not done.plan.num_tokens)
            self.drafter.keep_logits(state.slots(increments), logits)
            self._windows.take_over(list(increments))
            done.picks = None if picks is None else HostCopy(picks)
        done.read = increments
        behind = {request_id for request_id, tokens in new.items() if len(tokens) > len(increments.get(request_id, ()))}
        following = [one for one in fitting if not one.read_only and one.request_id not in behind]
        done.without_drafts["prefilling"] += len(fitting) - len(following)
        return following

    def _denoise_ahead(
        self, plan: DraftPlan, rows: WindowRows, table: TokenTable, num_new: Tensor, done: AsyncRound
    ) -> None:
        """Drafts blocks behind the contexts of some rows, and begins to copy what the host is to know of them."""
        device, width = self.towers.denoiser.device, plan.num_tokens
        computed = self._windows.lengths[rows.slots]
        rule = plan.commit_rule if isinstance(plan.commit_rule, Schedule) else FixedSteps(1, 0.0)
        blocks, _ = self.drafter.draft(
            self._windows.view(rows, plan.block_size),
            rows.slots,
            computed,
            torch.full_like(computed, signed_seed(self.seed)),
            plan.block_size,
            rule,
            num_wanted=width if rule.remaining_steps(0, plan.block_size) <= 1 else None,
        )
        done.token_ids, confidence = blocks.token_ids[:, :width], blocks.confidence[:, :width].float()
        is_current = moved(computed == table.lengths[rows.rows], device)
        done.usable = (is_current & confidence.isfinite().all(1))[:, None]
        context = (moved(x, device) for x in (computed, num_new))
        numbers = torch.stack([blocks.num_passes.to(device), *context, is_current.long()])
        done.copy = HostCopy(done.token_ids, confidence, numbers)
