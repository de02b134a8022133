"""DraftingSession: requests with their token ids in, drafts out; the host's side of drafting."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_kernels.backend import use_triton
from twotower_kernels.block_scan import warm_up
from twotower_spec.config import check_integer
from twotower_spec.drafting.admission import Admission, Admitted
from twotower_spec.drafting.backoff import Backoff
from twotower_spec.drafting.block_drafter import BlockDrafter, FirstToken
from twotower_spec.drafting.draft_block import DraftBlock, Noise, Provenance
from twotower_spec.drafting.policies import DraftPlan, DraftPolicy, FixedPolicy
from twotower_spec.drafting.round import DraftRequest, Round, RoundResult
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising import DenoisedBlocks, PublishedSchedule
from twotower_spec.generation.phase_times import PhaseTimes
from twotower_spec.generation.sampling import Sampler, signed_seed
from twotower_spec.state import ContextState
from twotower_spec.state.context_state import DEFAULT_PAGE_SIZE, DEFAULT_TOKEN_BUDGET, RequestId
from twotower_spec.towers.model import TwoTowers

DEFAULT_NUM_SLOTS = 8
DEFAULT_NUM_TOKENS = 2048
# In vLLM, where no knob names a number.
MOST_DEFAULT_SLOTS = 64
# Drafts per request and step: vLLM's own rejection sampler, which takes over from ours after a fault, asserts it.
MOST_DRAFT_TOKENS = 128


@dataclass(frozen=True)
class DrafterMemory:
    """Bytes that a drafter holds.

    Attributes:
        context_tower_bytes: weights, on `context_device`.
        state_bytes: the pool and the last logits of every request, on `context_device`.
        denoiser_tower_bytes: weights, on `denoiser_device`.
        workspace_bytes: keys of a block and its context, and time modulation, on `denoiser_device`.
    """

    context_tower_bytes: int
    state_bytes: int
    context_device: torch.device
    denoiser_tower_bytes: int
    workspace_bytes: int
    denoiser_device: torch.device

    def __str__(self) -> str:
        """In one line."""
        mib = 2**20
        return (
            f"context tower {self.context_tower_bytes / mib:.1f} MiB and state {self.state_bytes / mib:.1f} MiB on "
            f"{self.context_device}, denoiser tower {self.denoiser_tower_bytes / mib:.1f} MiB and workspace "
            f"{self.workspace_bytes / mib:.1f} MiB on {self.denoiser_device}"
        )


class DraftingSession:
    """Drafts blocks of tokens for requests that come and go.

    Requests that continue what is known are extended, one that does not is started over, alone; those that are not
    named keep their state until it is released or needed by others. Nothing that a request brings makes a call fail: it
    gets no drafts, and is counted.

    Attributes:
        num_token_ids: ids from this one on are not drafted.
        state: contexts of the requests.
        drafter: the part that runs on the devices.
        without_drafts: requests that got none in a round, all rounds together, by reason: "prefilling" (their context
            is not computed yet), "no room" (the pool is full), "foreign token" (an id that the drafter does not have),
            "policy" (drafting did not pay), "limit" (no draft was asked for), "not finite" (a tower or the state gave
            NaN; the context is read anew, after a pause that grows where others' numbers are sound).
    """

    def __init__(
        self,
        towers: TwoTowers,
        policy: DraftPolicy | None = None,
        *,
        first_token: FirstToken = "context",
        sampler: Sampler | None = None,
        noise: Noise = "private",
        seed: int = 0,
        num_slots: int = DEFAULT_NUM_SLOTS,
        num_tokens: int | None = None,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        num_token_ids: int | None = None,
    ) -> None:
        """Allocates the state.

        Args:
            towers: the model, each tower where it was placed.
            policy: how rounds draft; None for one step of a block of 8.
            first_token: take the first draft from the context tower, whose logits the extension yields anyway, or leave
                it to the denoiser.
            sampler: how tokens are picked; None for the most probable ones. The target's temperature here gives drafts
                that the p/q and block rules can weigh.
            noise: of the sampler: "private", or "shared" with the target under the coupled rule.
            seed: of private noise where a request brings none.
            num_slots: requests that can be held at once.
            num_tokens: tokens of all requests that can be held at once; None for 2048 per slot.
            token_budget: most tokens of the context tower in one round; what is left of a long prompt waits, requests
                with few new tokens go first.
            num_token_ids: ids from this one on are not drafted (where the target's vocabulary is the smaller one).

        Raises:
            ArgumentError: an argument is out of range, or the model has no denoiser.
        """
        towers.require_denoiser()
        vocab_size = towers.config.vocab_size
        num_tokens = num_slots * DEFAULT_NUM_TOKENS if num_tokens is None else num_tokens
        num_token_ids = vocab_size if num_token_ids is None else num_token_ids
        sizes = {"num_slots": num_slots, "num_tokens": num_tokens, "token_budget": token_budget}
        for name, value in {**sizes, "num_token_ids": num_token_ids}.items():
            check_integer(name, value, minimum=1)
        if first_token not in ("context", "denoiser"):
            raise ArgumentError(f"first_token {first_token!r} is not there; give 'context' or 'denoiser'")
        if noise not in ("private", "shared"):
            raise ArgumentError(f"noise {noise!r} is not there; give 'private' or 'shared'")
        self.towers, self.policy, self.seed = towers, policy or FixedPolicy(), seed
        self.num_token_ids = min(num_token_ids, vocab_size)
        self.state = ContextState.for_towers(towers, num_slots, -(-num_tokens // DEFAULT_PAGE_SIZE), room_to_grow=True)
        self.drafter = BlockDrafter(
            towers,
            self.state,
            num_slots,
            first_token=first_token,
            sampler=sampler or Sampler(),
            noise=noise,
            num_token_ids=self.num_token_ids,
        )
        self.without_drafts: Counter[str] = Counter()
        self._admission = Admission(self.state, token_budget, vocab_size)
        # Requests that gave NaN when others did not.
        self._damaged: dict[RequestId, Backoff] = {}

    @property
    def num_speculative_tokens(self) -> int:
        """Most drafts of any round."""
        return self.policy.num_speculative_tokens

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """Requests whose state is held."""
        return self.state.request_ids

    @property
    def provenance(self) -> Provenance:
        """How drafts of this session are made at most."""
        return self._provenance(self.policy.most_steps, not self.drafter.picker.sampler.greedy)

    def release(self, request_id: RequestId) -> None:
        """Forgets a request; unknown ids are ignored."""
        self._admission.release(request_id)
        self._damaged.pop(request_id, None)

    def reset(self) -> None:
        """Forgets all requests; also after an exception in the middle of a round, which leaves contexts half read."""
        self._admission.reset()
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
        plan = self.policy.plan(len(requests)) if requests else None
        block = DraftBlock.empty(tuple(one.request_id for one in requests))
        if plan is None:
            return self._counted(Round(block, None, without_drafts=Counter(policy=len(requests))))
        wanting = [one for one in requests if one.read_only or one.max_draft_tokens is None or one.max_draft_tokens > 0]
        trusted = [one for one in wanting if not self._rests(one.request_id)]
        times = PhaseTimes()
        with times.measure("extend", self.towers.context.device):
            admitted = self._read(trusted)
        drafted = [one for one in admitted.ready if not one.read_only]
        without_drafts = admitted.without_drafts + Counter(
            limit=len(requests) - len(wanting), prefilling=len(admitted.ready) - len(drafted)
        )
        without_drafts["not finite"] += len(wanting) - len(trusted)
        damaged: list[RequestId] = []
        if drafted:
            with times.measure("denoise", self.towers.denoiser.device):
                done, probs = self._denoise(plan, drafted)
                block, damaged = self._as_block(plan, block.request_ids, drafted, admitted, done, probs)
            self._note_damage(drafted, damaged)
            without_drafts["not finite"] += len(damaged)
        num_context_tokens = sum(map(len, admitted.increments.values()))
        host_s = time.perf_counter() - start
        sizes = len(drafted), len(damaged)
        return self._counted(Round(block, plan, num_context_tokens, times, host_s, without_drafts, *sizes))

    def observe(self, finished: Round, result: RoundResult) -> None:
        """Tells the policy what became of a round; also of one without drafts, where 0 were accepted."""
        self.policy.observe(finished.outcome(result))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs both towers for requests of its own: nothing large is allocated by later rounds.

        On a GPU this compiles kernels, for passes of the sizes that take different ones.

        Raises:
            ArgumentError: requests are held; the pool might have to give one up.
        """
        if len(self.state):
            raise ArgumentError(f"{len(self.state)} requests are held; warm up before the first one, or reset()")
        plan = self.policy.plan(1)
        # Policies that choose among several sizes say so.
        sizes = {*getattr(self.policy, "block_sizes", ()), *([plan.block_size] if plan else ())}
        context, config = self.towers.context, self.towers.config
        warm_up(context.device, context.dtype, config.mamba_head_dim, config.ssm_state_size)
        for lengths in self._trial_passes():
            trial = {object(): [0] * length for length in lengths}
            try:
                logits = self.state.extend(context, trial).logits
                assert logits is not None
                slots = self.state.slots(trial)
                self.drafter.keep_logits(slots, logits)
                zeros = torch.zeros_like(slots)
                for size in sorted(sizes, reverse=True):
                    self.drafter.draft(slots, zeros, zeros, size, PublishedSchedule(0.0, 1))
            finally:
                for request in trial:
                    self.state.release(request)

    def _trial_passes(self) -> list[list[int]]:
        """New tokens of the requests of each pass that `warm_up` makes, if the pool has room for it."""
        passes = [[1]]
        if use_triton(self.towers.context.embeddings):
            passes += [[17], [17, 1], [64], [300, 17], [1100]]
        state = self.state
        return [
            lengths
            for lengths in passes
            if len(lengths) <= state.num_slots
            and sum(map(state.pages_for, lengths)) <= state.num_pages
            and sum(lengths) <= self._admission.token_budget
        ]

    def memory(self) -> DrafterMemory:
        """Bytes held now; after `warm_up` they stay."""
        context, denoiser = self.towers.context, self.towers.denoiser
        return DrafterMemory(
            context_tower_bytes=sum(parameter.nbytes for parameter in context.parameters()),
            state_bytes=self.state.nbytes + self.drafter.last_logits.nbytes,
            context_device=context.device,
            denoiser_tower_bytes=sum(parameter.nbytes for parameter in denoiser.parameters()),
            workspace_bytes=self.state.workspace_nbytes + self.drafter.nbytes,
            denoiser_device=denoiser.device,
        )

    def _rests(self, request_id: RequestId) -> bool:
        backoff = self._damaged.get(request_id)
        return backoff is not None and backoff.skips_round()

    def _note_damage(self, drafted: Sequence[DraftRequest], damaged: Sequence[RequestId]) -> None:
        """Reads contexts of damaged requests again, so that drafts return when the fault has passed.

        Where all are damaged the fault is not theirs, and it is the caller's to pause.
        """
        for request_id in damaged:
            self._admission.restart(request_id)
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

    def _read(self, wanting: Sequence[DraftRequest]) -> Admitted:
        """Brings contexts up to date within the budget, in one pass."""
        admitted = self._admission.admit(wanting)
        if admitted.increments:
            logits = self.state.extend(self.towers.context, admitted.increments).logits
            assert logits is not None
            place = {request_id: row for row, request_id in enumerate(admitted.increments)}
            rows = torch.tensor([place[request_id] for request_id in admitted.completed], dtype=torch.int64)
            self.drafter.keep_logits(self.state.slots(admitted.completed), logits[rows.to(logits.device)])
        return admitted

    def _denoise(self, plan: DraftPlan, drafted: Sequence[DraftRequest]) -> tuple[DenoisedBlocks, Tensor | None]:
        most = plan.num_tokens
        longest = max(most if one.max_draft_tokens is None else one.max_draft_tokens for one in drafted)
        return self.drafter.draft(
            self.state.slots(one.request_id for one in drafted),
            torch.tensor([len(one.token_ids) for one in drafted]),
            torch.tensor([signed_seed(self.seed if one.seed is None else one.seed) for one in drafted]),
            plan.block_size,
            plan.commit_rule,
            num_wanted=min(most, longest) if self.policy.most_steps == 1 else None,
        )

    def _as_block(
        self,
        plan: DraftPlan,
        request_ids: tuple[RequestId, ...],
        drafted: Sequence[DraftRequest],
        admitted: Admitted,
        done: DenoisedBlocks,
        probs: Tensor | None,
    ) -> tuple[DraftBlock, list[RequestId]]:
        """Reads drafts from the device into a row per request, and says whose towers or states gave NaN."""
        confidence = done.confidence[:, : plan.num_tokens].float().cpu()
        finite: list[bool] = confidence.isfinite().all(1).tolist()
        confidence = confidence.nan_to_num(nan=0.0)
        num_passes: list[int] = done.num_passes.tolist()
        usable = self.policy.usable(plan, confidence, num_passes)
        counts = [
            (count if one.max_draft_tokens is None else min(count, one.max_draft_tokens)) if fine else 0
            for count, one, fine in zip(usable, drafted, finite, strict=True)
        ]
        place = {request_id: row for row, request_id in enumerate(request_ids)}
        rows = [place[one.request_id] for one in drafted]
        num_tokens, num_reqs, num_steps = max(counts), len(request_ids), max(num_passes)
        beyond = torch.arange(num_tokens) >= torch.tensor(counts)[:, None]
        if probs is not None:
            kept = num_steps <= 1 and not self.policy.selects_drafts
            probs = _spread(probs[:, :num_tokens].nan_to_num(nan=0.0), rows, num_reqs) if kept else None
        block = DraftBlock(
            request_ids=request_ids,
            block_size=plan.block_size,
            token_ids=_spread(done.token_ids[:, :num_tokens].cpu().masked_fill(beyond, -1), rows, num_reqs, -1),
            num_draft_tokens=_spread(torch.tensor(counts), rows, num_reqs).tolist(),
            confidence=_spread(confidence[:, :num_tokens].masked_fill(beyond, 0.0), rows, num_reqs),
            num_denoiser_passes=_spread(torch.tensor(num_passes), rows, num_reqs).tolist(),
            num_context_passes=[int(request_id in admitted.increments) for request_id in request_ids],
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
