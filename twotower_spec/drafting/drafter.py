"""BlockDrafter: rows of token ids in, drafts out; it keeps the context tower's state of every request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from twotower_kernels.backend import use_triton
from twotower_kernels.block_scan import warm_up
from twotower_spec.config import accumulation_dtype, check_integer
from twotower_spec.drafting.draft_block import DraftBlock, Noise, Provenance
from twotower_spec.drafting.policies import DraftPlan, DraftPolicy, FixedPolicy, RoundOutcome
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising import (
    DenoisedBlocks,
    DenoisingRequest,
    FirstStepProbs,
    HostLoop,
    PublishedSchedule,
    TokenPicker,
)
from twotower_spec.generation.result import PhaseTimes
from twotower_spec.generation.sampling import Sampler, signed_seed
from twotower_spec.state import ContextState
from twotower_spec.state.block_context import BlockContext, BlockWorkspace
from twotower_spec.state.context_state import DEFAULT_PAGE_SIZE, DEFAULT_TOKEN_BUDGET, RequestId
from twotower_spec.state.token_history import Row, all_below
from twotower_spec.towers.model import TwoTowers

FirstToken = Literal["context", "denoiser"]

DEFAULT_NUM_SLOTS = 8
DEFAULT_NUM_TOKENS = 2048
# Mixed into seeds, so that drafts never see the noise of the target; and more offsets than a block can have.
PRIVATE_SEED = 0x5DEECE66D
MOST_OFFSETS = 1 << 10


@dataclass
class DrafterCounters:
    """What happened in a drafter since it was made.

    Attributes:
        without_drafts: requests that got none in a round, by reason: "prefilling" (their context is not computed yet),
            "no room" (the pool is full), "foreign token" (an id that the drafter does not have), "policy" (drafting
            did not pay), "limit" (no draft was asked for), "not finite" (a tower or the state gave NaN; the context is
            read anew).
    """

    without_drafts: Counter[str] = field(default_factory=Counter)


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


class BlockDrafter:
    """Drafts blocks of tokens for many requests.

    Requests come and go as they like: a row that continues what is known is extended, one that does not is started
    over, alone; requests that are not named keep their state until it is released or needed by others. Nothing that a
    request brings makes a call fail: it gets no drafts, and is counted.
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
            seed: of private noise where a call gives no seeds.
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
        self.towers, self.policy = towers, policy or FixedPolicy()
        self.first_token, self.sampler, self.noise, self.seed = first_token, sampler or Sampler(), noise, seed
        self.token_budget = token_budget
        self.num_token_ids = min(num_token_ids, vocab_size)
        self.picker = TokenPicker(self.sampler, towers.config.mask_token_id, self.num_token_ids)
        num_pages = -(-num_tokens // DEFAULT_PAGE_SIZE)
        self.num_slots, self.num_pages = num_slots, num_pages
        self.state = ContextState(
            towers.config, num_slots, num_pages, towers.dtype, towers.context.device, room_to_grow=True
        )
        self.counters = DrafterCounters()
        self._denoisers: dict[int, HostLoop] = {}
        self._last_logits = torch.empty(
            (num_slots, vocab_size), dtype=accumulation_dtype(towers.dtype), device=towers.context.device
        )
        self._with_logits: set[RequestId] = set()
        self._workspace: BlockWorkspace | None = None
        self._plan: DraftPlan | None = None
        self._block: DraftBlock | None = None
        self.last_times = PhaseTimes()
        self._extended: dict[RequestId, int] = {}

    @property
    def num_speculative_tokens(self) -> int:
        """Most drafts of any round."""
        return self.policy.num_speculative_tokens

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """Requests whose state is held."""
        return self.state.request_ids

    @property
    def num_context_tokens(self) -> int:
        """Tokens that the context tower read in the last round."""
        return sum(self._extended.values())

    @property
    def provenance(self) -> Provenance:
        """How drafts of this drafter are made at most."""
        noise: Noise = "none" if self.sampler.greedy else self.noise
        known = not self.sampler.greedy and self.policy.most_steps <= 1 and not self.policy.selects_drafts
        return Provenance(self.policy.most_steps, noise, known)

    def release(self, request_id: RequestId) -> None:
        """Forgets a request; unknown ids are ignored."""
        self.state.release(request_id)
        self._with_logits.discard(request_id)

    def reset(self) -> None:
        """Forgets all requests; also after an exception in the middle of a round, which leaves contexts half read."""
        self.state.reset()
        self._with_logits.clear()
        self._plan = self._block = None
        self._extended = {}

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
            requests = {object(): [0] * length for length in lengths}
            zeros = torch.zeros(len(requests), dtype=torch.long, device=self.towers.denoiser.device)
            try:
                self.state.extend(context, requests)
                if self.first_token == "context":
                    self._first_tokens(list(requests), zeros, zeros)
                for size in sorted(sizes, reverse=True):
                    block = self._context(list(requests), size)
                    self._denoiser(size).denoise(DenoisingRequest(block, zeros, zeros, PublishedSchedule(0.0, 1)))
            finally:
                for request in requests:
                    self.state.release(request)

    def _trial_passes(self) -> list[list[int]]:
        """New tokens of the requests of each pass that `warm_up` makes, if the pool has room for it."""
        passes = [[1]]
        if use_triton(self.towers.context.embeddings):
            passes += [[17], [17, 1], [64], [300, 17], [1100]]
        pages = [sum(map(self.state.kv_cache.pages_for, lengths)) for lengths in passes]
        return [
            lengths
            for lengths, needed in zip(passes, pages, strict=True)
            if len(lengths) <= self.num_slots and needed <= self.num_pages and sum(lengths) <= self.token_budget
        ]

    def memory(self) -> DrafterMemory:
        """Bytes held now; after `warm_up` they stay."""
        context, denoiser = self.towers.context, self.towers.denoiser
        workspace = self._workspace.nbytes if self._workspace else 0
        return DrafterMemory(
            context_tower_bytes=sum(parameter.nbytes for parameter in context.parameters()),
            state_bytes=self.state.nbytes + self._last_logits.nbytes,
            context_device=context.device,
            denoiser_tower_bytes=sum(parameter.nbytes for parameter in denoiser.parameters()),
            workspace_bytes=workspace + sum(made.nbytes for made in self._denoisers.values()),
            denoiser_device=denoiser.device,
        )

    @torch.inference_mode()
    def draft(
        self,
        rows: Mapping[Any, Row],  # request ids are any Hashable; Mapping's keys know no wider type
        most_tokens: Mapping[Any, int] | None = None,
        seeds: Mapping[Any, int] | None = None,
        read_only: Collection[Any] = (),
    ) -> DraftBlock:
        """Drafts what may follow every row.

        Args:
            rows: all token ids of each request so far, prompt included, as lists or (cheaper to compare with what was
                read) integer arrays.
            most_tokens: drafts that a request can use, where fewer than `num_speculative_tokens`.
            seeds: of sampling noise, per request; None for the drafter's own. Not used by the most probable tokens.
            read_only: requests whose context is brought up to date and that get no drafts: the target is still reading
                their prompts.

        Returns:
            One row per request, in the order given.
        """
        self.last_times = PhaseTimes()
        self._plan = self.policy.plan(len(rows)) if rows else None
        self._extended = {}
        texts: dict[RequestId, Row] = {**rows}
        limits: dict[RequestId, int] = {**dict.fromkeys(rows, self.num_speculative_tokens), **(most_tokens or {})}
        own_seeds: dict[RequestId, int] = {**dict.fromkeys(rows, self.seed), **(seeds or {})}
        if self._plan is None:
            self.counters.without_drafts["policy"] += len(rows)
            self._block = DraftBlock.empty(tuple(rows))
            return self._block
        wanting = {rid: row for rid, row in texts.items() if limits[rid] > 0 or rid in read_only}
        self.counters.without_drafts["limit"] += len(texts) - len(wanting)
        with self.last_times.measure("extend", self.towers.context.device):
            ready = self._advance(wanting)
        drafted = [request_id for request_id in ready if request_id not in read_only]
        self.counters.without_drafts["prefilling"] += len(ready) - len(drafted)
        self._block = DraftBlock.empty(tuple(rows))
        if drafted:
            with self.last_times.measure("denoise", self.towers.denoiser.device):
                self._block = self._denoise(self._plan, texts, drafted, limits, own_seeds)
        return self._block

    def observe(
        self,
        num_accepted: Mapping[Any, int],
        verify_s: float,
        num_verified: Mapping[Any, int] | None = None,
        with_prompts: bool = False,
    ) -> None:
        """Tells the policy what became of the last round; also of one without drafts, where 0 were accepted.

        Args:
            num_accepted: per request of that round; requests that the target did not run are left out.
            verify_s: seconds that the target took for the whole batch.
            num_verified: drafts that were verified, where fewer than were given.
            with_prompts: whether the target read prompts in the same pass, which take time of their own.
        """
        block = self._block
        if block is None:
            return
        kept = [i for i, request_id in enumerate(block.request_ids) if request_id in num_accepted]
        self.policy.observe(
            RoundOutcome(
                plan=self._plan,
                num_draft_tokens=[
                    (num_verified or {}).get(block.request_ids[i], block.num_draft_tokens[i]) for i in kept
                ],
                num_accepted=[num_accepted[block.request_ids[i]] for i in kept],
                confidence=block.confidence[kept],
                num_denoiser_passes=[block.num_denoiser_passes[i] for i in kept],
                num_context_tokens=self.num_context_tokens,
                extend_s=self.last_times.extend_s,
                denoise_s=self.last_times.denoise_s,
                verify_s=verify_s,
                with_prompts=with_prompts,
            )
        )

    def _advance(self, rows: Mapping[RequestId, Row]) -> list[RequestId]:
        """Brings contexts up to date within the budget; the requests that are, in the order of `rows`."""
        new = self._that_fit(rows)
        logits = self.state.advance_by(self.towers.context, new, self.token_budget)
        missing = {rid: len(rows[rid]) - self.state.num_computed_tokens(rid) for rid in new}
        self._extended = {rid: len(new[rid]) - missing[rid] for rid in new if len(new[rid]) > missing[rid]}
        self._with_logits = {rid for rid in self._with_logits if rid not in self._extended and rid in self.state}
        if logits:
            self._last_logits[self._slots(logits)] = torch.stack(list(logits.values()))
            self._with_logits.update(logits)
        ready = [rid for rid in rows if missing.get(rid) == 0]
        self.counters.without_drafts["prefilling"] += len(new) - len(ready)
        return ready

    def _slots(self, request_ids: Iterable[RequestId]) -> Tensor:
        """Where the last logits of requests are, int64 [num_reqs]."""
        slots = [self.state.entry(request_id).slot for request_id in request_ids]
        return torch.tensor(slots, device=self._last_logits.device)

    def _that_fit(self, rows: Mapping[RequestId, Row]) -> dict[RequestId, Row]:
        """New tokens of the rows whose states fit into the pool together, the fewest first."""
        new = {request_id: row[self._known(request_id, row) :] for request_id, row in rows.items()}
        chosen: dict[RequestId, Row] = {}
        pages = 0
        for request_id in sorted(rows, key=lambda request_id: len(new[request_id])):
            needed = self.state.kv_cache.pages_for(len(rows[request_id]))
            if len(chosen) >= self.num_slots or pages + needed > self.num_pages:
                self.counters.without_drafts["no room"] += 1
            elif not len(rows[request_id]) or not all_below(new[request_id], self.towers.config.vocab_size):
                self.counters.without_drafts["foreign token"] += 1
            else:
                chosen[request_id] = new[request_id]
                pages += needed
        return chosen

    def _known(self, request_id: RequestId, row: Row) -> int:
        """Tokens of a row whose state is held and will do; a request whose state will not do is started over.

        So is one whose last logits are gone, which a complete state could not give again, and one that holds more room
        than it needs.
        """
        count = self.state.continue_or_restart(request_id, row)
        if request_id in self.state:
            lacks_logits = count == len(row) and request_id not in self._with_logits
            reserved = len(self.state.entry(request_id).pages)
            if lacks_logits or reserved > self.state.kv_cache.pages_for(max(len(row), 1)):
                self.state.restart(request_id)
                count = 0
        if not count:
            self._with_logits.discard(request_id)
        return count

    def _denoise(
        self,
        plan: DraftPlan,
        rows: Mapping[RequestId, Row],
        drafted: list[RequestId],
        limits: Mapping[RequestId, int],
        seeds: Mapping[RequestId, int],
    ) -> DraftBlock:
        """One block for every request that is ready, the others' rows empty."""
        denoiser = self.towers.denoiser
        device = denoiser.device
        own_seeds = [signed_seed(seeds[request_id]) for request_id in drafted]
        starts = torch.tensor([len(rows[request_id]) for request_id in drafted], device=device)
        if self.noise == "private":
            own_seeds = [seed ^ PRIVATE_SEED for seed in own_seeds]
            positions = starts * MOST_OFFSETS  # noise of a round is never used again by another round
        else:
            positions = starts
        seed_tensor = torch.tensor(own_seeds, device=device)
        first = self._first_tokens(drafted, seed_tensor, positions) if self.first_token == "context" else None
        most_wanted = min(plan.num_tokens, max(limits[request_id] for request_id in drafted))
        request = DenoisingRequest(
            self._context(drafted, plan.block_size),
            seed_tensor,
            positions,
            plan.rule,
            first_tokens=first[0] if first else None,
            first_confidence=first[1] if first else None,
            same_noise=self.noise == "shared",
            num_wanted=most_wanted if self.policy.most_steps == 1 else None,
        )
        first_step = FirstStepProbs(self.picker)
        observers = [] if self.sampler.greedy else [first_step]
        done = self._denoiser(plan.block_size).denoise(request, observers)
        probs = first_step.probs
        if first is not None and first[2] is not None:
            if probs is None:  # a block of one token, which the denoiser was not asked for
                probs = first[2][:, None]
            probs[:, 0] = first[2]
        return self._as_block(plan, tuple(rows), drafted, limits, done, probs)

    def _first_tokens(
        self, drafted: list[RequestId], seeds: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The context tower's next tokens, how probable they are, and the distributions they were drawn from."""
        logits = self._last_logits[self._slots(drafted)].to(seeds.device)
        tokens, confidence = self.picker.pick(logits, seeds, positions)
        return tokens, confidence, None if self.sampler.greedy else self.picker.probs(logits)

    def _as_block(
        self,
        plan: DraftPlan,
        request_ids: tuple[RequestId, ...],
        drafted: list[RequestId],
        limits: Mapping[RequestId, int],
        done: DenoisedBlocks,
        probs: Tensor | None,
    ) -> DraftBlock:
        confidence = done.confidence[:, : plan.num_tokens].float().cpu()
        finite = confidence.isfinite().all(1).tolist()
        if not all(finite):
            confidence = confidence.nan_to_num(nan=0.0)
        num_passes_of = done.num_passes.tolist()
        usable = self.policy.usable(plan, confidence, num_passes_of)
        counts = [
            min(count, limits[request_id]) if fine else 0
            for count, request_id, fine in zip(usable, drafted, finite, strict=True)
        ]
        self._start_over([request_id for request_id, fine in zip(drafted, finite, strict=True) if not fine])
        num_tokens = max(counts)
        confidence = confidence[:, :num_tokens]
        place = {request_id: i for i, request_id in enumerate(request_ids)}
        at = torch.tensor([place[request_id] for request_id in drafted])
        token_ids = torch.full((len(request_ids), num_tokens), -1)
        beyond = torch.arange(num_tokens) >= torch.tensor(counts)[:, None]
        token_ids[at] = done.token_ids[:, :num_tokens].cpu().masked_fill(beyond, -1)
        all_confidence = torch.zeros(token_ids.shape)
        all_confidence[at] = confidence.masked_fill(beyond, 0.0)
        num_draft_tokens, num_passes = [0] * len(request_ids), [0] * len(request_ids)
        for i, request_id in enumerate(drafted):
            num_draft_tokens[place[request_id]], num_passes[place[request_id]] = counts[i], num_passes_of[i]
        num_steps = max(num_passes_of)
        all_probs = None
        if probs is not None and num_steps <= 1 and not self.policy.selects_drafts:
            all_probs = probs.new_zeros(*token_ids.shape, probs.shape[-1])
            all_probs[at.to(probs.device)] = probs[:, :num_tokens].nan_to_num(nan=0.0)
        return DraftBlock(
            request_ids=request_ids,
            block_size=plan.block_size,
            token_ids=token_ids,
            num_draft_tokens=num_draft_tokens,
            confidence=all_confidence,
            num_denoiser_passes=num_passes,
            num_context_passes=[int(request_id in self._extended) for request_id in request_ids],
            provenance=Provenance(num_steps, self.provenance.noise, all_probs is not None),
            probs=all_probs,
        )

    def _start_over(self, damaged: list[RequestId]) -> None:
        """Forgets contexts that gave NaN, so that drafts return when the fault has passed."""
        self.counters.without_drafts["not finite"] += len(damaged)
        for request_id in damaged:
            self.state.restart(request_id)
            self._with_logits.discard(request_id)

    def _context(self, request_ids: list[RequestId], block_size: int) -> BlockContext:
        """Context of requests for one block, in the drafter's own workspace."""
        denoiser = self.towers.denoiser
        room = self.num_pages * DEFAULT_PAGE_SIZE + self.num_slots * block_size
        if self._workspace is None or self._workspace.num_tokens < room:
            self._workspace = BlockWorkspace(self.towers.config, room, denoiser.dtype, denoiser.device)
        return self.state.block_context(request_ids, block_size, denoiser.device, denoiser.dtype, self._workspace)

    def _denoiser(self, block_size: int) -> HostLoop:
        if block_size not in self._denoisers:
            self._denoisers[block_size] = HostLoop(self.towers.denoiser, block_size, self.picker)
        return self._denoisers[block_size]
