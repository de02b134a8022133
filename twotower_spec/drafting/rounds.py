"""Rounds of drafting: what all sessions share, whoever computes the contexts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twotower_spec.config import check_integer
from twotower_spec.drafting.admission import Admitted
from twotower_spec.drafting.backoff import Backoff
from twotower_spec.drafting.block_drafter import BlockDrafter
from twotower_spec.drafting.draft_block import DraftBlock, Noise, Provenance
from twotower_spec.drafting.policies import Candidate, DraftPlan, DraftPolicy, FixedPolicy
from twotower_spec.drafting.round import DraftRequest, Round, RoundResult
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising import DenoisedBlocks, PublishedSchedule
from twotower_spec.generation.phase_times import PhaseTimes
from twotower_spec.generation.sampling import signed_seed
from twotower_spec.state import ContextSource
from twotower_spec.state.context_state import RequestId
from twotower_spec.state.transfer import HostCopy
from twotower_spec.towers.model import TwoTowers

# Requests of the largest trial of a warm-up; what more of them take follows from that.
TRIAL_ROWS = 16


@dataclass(frozen=True)
class DrafterMemory:
    """Bytes that a drafter holds.

    Attributes:
        denoiser_tower_bytes: weights, on `denoiser_device`.
        workspace_bytes: on `denoiser_device`, time modulation, keys of blocks and their contexts where PyTorch reads
            them, and the mirror of the pool where the denoiser has another device or dtype.
        context_tower_bytes: weights, on `context_device`.
        state_bytes: the pool and the last logits of every request, on `context_device`.
        context_device: None where somebody else computes the contexts.
        graphs_bytes: CUDA graphs of both towers.
    """

    denoiser_tower_bytes: int
    workspace_bytes: int
    denoiser_device: torch.device
    context_tower_bytes: int = 0
    state_bytes: int = 0
    context_device: torch.device | None = None
    graphs_bytes: int = 0

    def __str__(self) -> str:
        """In one line."""
        mib = 2**20
        own = (
            f"context tower {self.context_tower_bytes / mib:.1f} MiB and state {self.state_bytes / mib:.1f} MiB on "
            f"{self.context_device}"
        )
        return (
            f"{'no context tower and no state of its own' if self.context_device is None else own}, denoiser tower "
            f"{self.denoiser_tower_bytes / mib:.1f} MiB and workspace {self.workspace_bytes / mib:.1f} MiB on "
            f"{self.denoiser_device}{f', CUDA graphs {self.graphs_bytes / mib:.1f} MiB' if self.graphs_bytes else ''}"
        )


class DraftingRounds(ABC):
    """Rounds by a policy, with limits, seeds, and rows of drafts; subclasses say where contexts are.

    Nothing that a request brings makes a call fail: it gets no drafts, and is counted.

    Attributes:
        num_token_ids: ids from this one on are not drafted.
        drafter: the part that runs on the devices.
        source: of the contexts.
        num_known: tokens that are known before, at the beginning of every block; they are no drafts.
        without_drafts: requests that got none in a round, all rounds together, by reason: "prefilling" (their context
            is not computed yet), "no room" (the pool is full), "foreign token" (an id that the drafter does not have),
            "policy" (drafting did not pay), "limit" (no draft was asked for), "not finite" (a tower or the state gave
            NaN, or ids that are no tokens; the context is read anew, after a pause that grows where others are sound).
    """

    drafter: BlockDrafter
    source: ContextSource
    num_known = 0

    def __init__(
        self, towers: TwoTowers, policy: DraftPolicy | None, noise: Noise, seed: int, num_token_ids: int | None
    ):
        """Checks what all sessions take.

        Args:
            towers: the model, each tower where it was placed.
            policy: how rounds draft; None for one step of a block of 8.
            noise: of the sampler.
            seed: of private noise where a request brings none.
            num_token_ids: ids from this one on are not drafted; None for those of the model.

        Raises:
            ArgumentError: an argument is out of range, or the model has no denoiser.
        """
        towers.require_denoiser()
        vocab_size = towers.config.vocab_size
        num_token_ids = vocab_size if num_token_ids is None else num_token_ids
        check_integer("num_token_ids", num_token_ids, minimum=1)
        if noise not in ("private", "shared"):
            raise ArgumentError(f"noise {noise!r} is not there; give 'private' or 'shared'")
        self.towers, self.policy, self.seed = towers, policy or FixedPolicy(), seed
        self.num_token_ids = min(num_token_ids, vocab_size)
        self.without_drafts: Counter[str] = Counter()
        # Requests that gave NaN when others did not.
        self._damaged: dict[RequestId, Backoff] = {}

    @property
    @abstractmethod
    def request_ids(self) -> tuple[RequestId, ...]:
        """Requests whose state is held here."""

    @abstractmethod
    def memory(self) -> DrafterMemory:
        """Bytes held now; after `warm_up` they stay."""

    @abstractmethod
    def warm_up(self) -> None:
        """Runs the towers for requests of its own: nothing large is allocated by later rounds.

        On a GPU this compiles kernels, for passes of the sizes that take different ones.

        Raises:
            ArgumentError: requests are held; the pool might have to give one up.
        """

    @abstractmethod
    def _read(self, wanting: Sequence[DraftRequest], times: PhaseTimes, plan: DraftPlan) -> Admitted:
        """Brings contexts up to date, as far as the plan's number of tokens goes."""

    @abstractmethod
    def _num_unread(self, request_id: RequestId, num_tokens: int) -> int:
        """Tokens of a request of this length that its context lacks."""

    @abstractmethod
    def _restart(self, request_id: RequestId) -> None:
        """Has a context read again."""

    @property
    def num_speculative_tokens(self) -> int:
        """Most drafts of any round."""
        return self.policy.num_speculative_tokens

    @property
    def provenance(self) -> Provenance:
        """How drafts of this session are made at most."""
        return self._provenance(self.policy.most_steps, not self.drafter.picker.sampler.greedy)

    def release(self, request_id: RequestId) -> None:
        """Forgets a request; unknown ids are ignored."""
        self._damaged.pop(request_id, None)
        self.policy.forget(request_id)

    def reset(self) -> None:
        """Forgets all requests; also after an exception in the middle of a round, which leaves contexts half read."""
        self._damaged.clear()

    @torch.inference_mode()
    def draft(self, requests: Sequence[DraftRequest]) -> Round:
        """Drafts what may follow every request.

        Args:
            requests: each named once.

        Returns:
            The round, which has a row per request in the order given. `observe` takes it back.
        """
        start = time.perf_counter()
        plan = self._plan(requests) if requests else None
        block = DraftBlock.empty(tuple(one.request_id for one in requests))
        if plan is None:
            return self._counted(Round(block, None, without_drafts=Counter(policy=len(requests))))
        chosen = [one for row, one in enumerate(requests) if plan.chooses(row)]
        wanting = [one for one in chosen if one.read_only or one.max_draft_tokens is None or one.max_draft_tokens > 0]
        trusted = [one for one in wanting if not self._rests(one.request_id)]
        times = PhaseTimes()
        admitted = self._read(trusted, times, plan)
        ready = admitted.ready if plan.num_tokens else []
        readable = [one for one in ready if not one.read_only]
        drafted = self._worth_denoising(plan, readable)
        without_drafts = admitted.without_drafts + Counter(
            policy=len(requests) - len(chosen) + len(admitted.ready) - len(ready) + len(readable) - len(drafted),
            limit=len(chosen) - len(wanting),
            prefilling=len(ready) - len(readable),
        )
        without_drafts["not finite"] += len(wanting) - len(trusted)
        damaged: list[RequestId] = []
        if drafted:
            with times.measure("denoise", self.towers.denoiser.device):
                done, probs = self._denoise(plan, drafted)
                block, damaged = self._as_block(plan, block.request_ids, drafted, admitted.increments, done, probs)
            self._note_damage(drafted, damaged)
            without_drafts["not finite"] += len(damaged)
        num_context_tokens = sum(map(len, admitted.increments.values()))
        host_s = time.perf_counter() - start
        sizes = len(drafted), len(damaged)
        return self._counted(
            Round(
                block,
                plan,
                num_context_tokens,
                times,
                host_s,
                without_drafts,
                *sizes,
                foreseen=admitted.foreseen,
                refused=admitted.refused,
            )
        )

    def _plan(self, requests: Sequence[DraftRequest]) -> DraftPlan | None:
        """Has the policy decide, before anything is read."""
        candidates = [
            Candidate(
                one.request_id,
                self._num_unread(one.request_id, len(one.token_ids)),
                0 if one.read_only else one.max_draft_tokens,
            )
            for one in requests
        ]
        plan = self.policy.plan(len(requests), candidates)
        if plan is not None and plan.num_tokens > plan.block_size - self.num_known:
            plan = replace(plan, num_tokens=plan.block_size - self.num_known)
        return plan

    def _worth_denoising(self, plan: DraftPlan, readable: Sequence[DraftRequest]) -> list[DraftRequest]:
        """Those of a plan's requests that are drafted for, by how sure the context tower is of their next tokens."""
        if not readable or not self.policy.selects_drafts or self.drafter.first_token != "context":
            return list(readable)
        confidence = self.drafter.first_confidence(*self._places(readable)).float().cpu()
        finite = [one.request_id for one, fine in zip(readable, confidence.isfinite().tolist(), strict=True) if fine]
        worth = self.policy.worth_denoising(plan, finite, confidence[confidence.isfinite()]) if finite else []
        unlikely = {request_id for request_id, is_worth in zip(finite, worth, strict=True) if not is_worth}
        return [one for one in readable if one.request_id not in unlikely]

    def _places(self, drafted: Sequence[DraftRequest]) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, starts of the blocks, and seeds, int64 [num_reqs] each."""
        return (
            self.source.slots(one.request_id for one in drafted),
            torch.tensor([len(one.token_ids) - self.num_known for one in drafted]),
            torch.tensor([signed_seed(self.seed if one.seed is None else one.seed) for one in drafted]),
        )

    def observe(self, finished: Round, result: RoundResult) -> None:
        """Tells the policy what became of a round; also of one without drafts, where 0 were accepted."""
        self.policy.observe(finished.outcome(result))

    def _rests(self, request_id: RequestId) -> bool:
        backoff = self._damaged.get(request_id)
        return backoff is not None and backoff.skips_round()

    def _note_damage(self, drafted: Sequence[DraftRequest], damaged: Sequence[RequestId]) -> None:
        """Reads contexts of damaged requests again, so that drafts return when the fault has passed.

        Where all are damaged the fault is not theirs, and it is the caller's to pause.
        """
        for request_id in damaged:
            self._restart(request_id)
        if len(damaged) == len(drafted):
            return
        for one in drafted:
            if one.request_id in damaged:
                self._damaged.setdefault(one.request_id, Backoff()).failed()
            else:
                self._damaged.pop(one.request_id, None)

    def _counted(self, done: Round) -> Round:
        self.without_drafts.update(done.without_drafts)
        return done

    def _denoise(self, plan: DraftPlan, drafted: Sequence[DraftRequest]) -> tuple[DenoisedBlocks, Tensor | None]:
        most, known = plan.num_tokens, self.num_known
        longest = max(most if one.max_draft_tokens is None else one.max_draft_tokens for one in drafted)
        slots, starts, seeds = self._places(drafted)
        return self.drafter.draft(
            self.source.view(slots, plan.block_size),
            slots,
            starts,
            seeds,
            plan.block_size,
            plan.commit_rule,
            num_wanted=known + min(most, longest) if self.policy.most_steps == 1 else None,
            first_tokens=torch.tensor([int(one.token_ids[-1]) for one in drafted]) if known else None,
        )

    def _block_sizes(self) -> set[int]:
        """Sizes of block that the policy may choose; policies that choose among several say so."""
        if (sizes := getattr(self.policy, "block_sizes", None)) is not None:
            return set(sizes)
        plan = self.policy.plan(1)
        return {plan.block_size} if plan else set()

    def _warm_up_blocks(self, slots: Tensor, num_tokens: int = 0, extend_s: float | None = None) -> None:
        """Denoises blocks of all sizes that the policy may choose, from contexts of no use.

        Args:
            slots: of the contexts.
            num_tokens, extend_s: the pass that read them, which the policy is told with what blocks take; None to tell
                it nothing.
        """
        zeros, device = torch.zeros_like(slots), self.towers.denoiser.device
        first = zeros if self.num_known else None
        for size in sorted(self._block_sizes(), reverse=True):
            context, times = self.source.view(slots, size), PhaseTimes()
            with times.measure("denoise", device):
                self.drafter.draft(context, slots, zeros, zeros, size, PublishedSchedule(0.0, 1), first_tokens=first)
            if extend_s is not None:
                self.policy.learn_costs(num_tokens, len(slots), size, extend_s, times.denoise_s)

    def _as_block(
        self,
        plan: DraftPlan,
        request_ids: tuple[RequestId, ...],
        drafted: Sequence[DraftRequest],
        read: Collection[RequestId],
        done: DenoisedBlocks,
        probs: Tensor | None = None,
        selects: bool = True,
    ) -> tuple[DraftBlock, list[RequestId]]:
        """Reads drafts from the device into a row per request, and says whose towers or states gave NaN, or no tokens.

        Args:
            plan, request_ids: of the round.
            drafted: requests of the rows of `done` and `probs`.
            read: requests whose context was read on in this round.
            done, probs: what the drafter gave.
            selects: whether the policy may keep drafts back.
        """
        drafts = slice(self.num_known, self.num_known + plan.num_tokens)
        values = done.confidence[:, drafts].float(), done.token_ids[:, drafts], done.num_passes
        confidence, token_ids, passes = HostCopy(*values).read()
        # A target would embed whatever id it is given; positions that nobody wants are masked still.
        is_masked = token_ids == self.drafter.picker.mask_token_id
        is_token = (token_ids >= 0) & (token_ids < self.num_token_ids) & ~is_masked
        finite: list[bool] = (confidence.isfinite() & (is_token | is_masked)).all(1).tolist()
        committed: list[int] = is_token.int().cumprod(1).sum(1).tolist()
        confidence = confidence.nan_to_num(nan=0.0)
        num_passes: list[int] = passes.tolist()
        width = confidence.shape[1]
        usable = self.policy.usable(plan, confidence, num_passes) if selects else [width] * len(drafted)
        counts = [
            min(count, first_masked, width if one.max_draft_tokens is None else one.max_draft_tokens) if fine else 0
            for count, first_masked, one, fine in zip(usable, committed, drafted, finite, strict=True)
        ]
        place = {request_id: row for row, request_id in enumerate(request_ids)}
        rows = [place[one.request_id] for one in drafted]
        num_tokens, num_reqs, num_steps = max(counts), len(request_ids), max(num_passes)
        beyond = torch.arange(num_tokens) >= torch.tensor(counts)[:, None]
        if probs is not None:
            kept = num_steps <= 1 and not self.policy.selects_drafts
            probs = _spread(probs[:, drafts][:, :num_tokens].nan_to_num(nan=0.0), rows, num_reqs) if kept else None
        block = DraftBlock(
            request_ids=request_ids,
            block_size=plan.block_size,
            token_ids=_spread(token_ids[:, :num_tokens].masked_fill(beyond, -1), rows, num_reqs, -1),
            num_draft_tokens=_spread(torch.tensor(counts), rows, num_reqs).tolist(),
            confidence=_spread(confidence[:, :num_tokens].masked_fill(beyond, 0.0), rows, num_reqs),
            num_denoiser_passes=_spread(torch.tensor(num_passes), rows, num_reqs).tolist(),
            num_context_passes=[int(request_id in read) for request_id in request_ids],
            provenance=self._provenance(num_steps, probs is not None),
            probs=probs,
        )
        return block, [one.request_id for one, fine in zip(drafted, finite, strict=True) if not fine]

    def _provenance(self, num_steps: int, sampled: bool) -> Provenance:
        drafter = self.drafter
        known = sampled and num_steps <= 1 and not self.policy.selects_drafts
        return Provenance(num_steps, "none" if drafter.picker.sampler.greedy else drafter.noise, known)


def _spread(values: Tensor, rows: list[int], num_reqs: int, fill: int = 0) -> Tensor:
    """Puts values [num_drafted, ...] at their rows of [num_reqs, ...]."""
    spread = values.new_full((num_reqs, *values.shape[1:]), fill)
    spread[rows] = values
    return spread
