"""DraftingSession: requests with their token ids in, drafts out; their contexts are in a pool of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from twotower_kernels.backend import use_triton
from twotower_kernels.block_scan import warm_up
from twotower_spec.config import check_integer
from twotower_spec.drafting.admission import Admission, Admitted
from twotower_spec.drafting.block_drafter import BlockDrafter, FirstToken
from twotower_spec.drafting.draft_block import Noise
from twotower_spec.drafting.policies import DraftPlan, DraftPolicy
from twotower_spec.drafting.policies.policy import MOST_COMPARED
from twotower_spec.drafting.round import DraftRequest
from twotower_spec.drafting.rounds import TRIAL_ROWS, DrafterMemory, DraftingRounds
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising import DenoisingLoop, HostLoop
from twotower_spec.generation.phase_times import PhaseTimes
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state import ContextState
from twotower_spec.state.context_state import DEFAULT_PAGE_SIZE, DEFAULT_TOKEN_BUDGET, RequestId
from twotower_spec.state.graphs import PassGraphs
from twotower_spec.state.token_history import TokenSequence
from twotower_spec.state.transfer import to_device
from twotower_spec.state.window import ContextWindows
from twotower_spec.towers.model import TwoTowers

DEFAULT_NUM_SLOTS = 8
DEFAULT_NUM_TOKENS = 2048
# In vLLM, where no knob names a number.
MOST_DEFAULT_SLOTS = 64
# Drafts per request and step: vLLM's own rejection sampler, which takes over from ours after a fault, asserts it.
MOST_DRAFT_TOKENS = 128


class DraftingSession(DraftingRounds):
    """Drafts blocks of tokens for requests that come and go, whose contexts the context tower reads into a pool.

    Requests that continue what is known are extended, one that does not is started over, alone; those that are not
    named keep their state until it is released or needed by others.

    Attributes:
        state: contexts of the requests.
    """

    # Whether passes of fixed shape run in the pool.
    scratch = False

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
        loop: type[DenoisingLoop] = HostLoop,
        most_per_step: int | None = None,
        max_context_tokens: int | None = None,
        cuda_graphs: bool = True,
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
            loop: that fills the blocks.
            most_per_step: tokens that the target commits at most for one request in a step; None for all drafts and one
                more.
            max_context_tokens: of one request that passes are captured for; None for all of the pool.
            cuda_graphs: whether `warm_up` captures passes of fixed shape, on CUDA.

        Raises:
            ArgumentError: an argument is out of range, or the model has no denoiser.
        """
        super().__init__(towers, policy, noise, seed, num_token_ids)
        num_tokens = num_slots * DEFAULT_NUM_TOKENS if num_tokens is None else num_tokens
        sizes = {"num_slots": num_slots, "num_tokens": num_tokens, "token_budget": token_budget}
        for name, value in sizes.items():
            check_integer(name, value, minimum=1)
        if first_token not in ("context", "denoiser"):
            raise ArgumentError(f"first_token {first_token!r} is not there; give 'context' or 'denoiser'")
        on_cuda = towers.context.device.type == "cuda"
        self.state = ContextState.for_towers(
            towers, num_slots, -(-num_tokens // DEFAULT_PAGE_SIZE), room_to_grow=True, scratch=self.scratch or on_cuda
        )
        self.source = self.state
        self.drafter = BlockDrafter(
            towers,
            num_slots,
            first_token=first_token,
            sampler=sampler or Sampler(),
            noise=noise,
            num_token_ids=self.num_token_ids,
            loop=loop,
            cuda_graphs=cuda_graphs,
        )
        device, graphs = towers.context.device, self.drafter.graphs
        # Graphs of one device share their memory: it is one pass's at a time.
        self._graphs = graphs if graphs.device == device else PassGraphs.of_tower(towers.context, cuda_graphs)
        width = self.num_speculative_tokens + 1 if most_per_step is None else most_per_step
        self._windows = ContextWindows(self.state, width, self._graphs)
        most_tokens = num_tokens if max_context_tokens is None else max_context_tokens
        self._max_pages = min(self.state.num_pages, self.state.pages_for(most_tokens))
        self._admission = Admission(self.state, token_budget, towers.config.vocab_size)

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """Requests whose state is held."""
        return self.state.request_ids

    def release(self, request_id: RequestId) -> None:
        """Forgets a request; unknown ids are ignored."""
        super().release(request_id)
        self._admission.release(request_id)

    def reset(self) -> None:
        """Forgets all requests; see `DraftingRounds.reset`."""
        super().reset()
        self._admission.reset()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs both towers for requests of its own; see `DraftingRounds.warm_up`."""
        if len(self.state):
            raise ArgumentError(f"{len(self.state)} requests are held; warm up before the first one, or reset()")
        context, config = self.towers.context, self.towers.config
        warm_up(context.device, context.dtype, config.mamba_head_dim, config.ssm_state_size)
        for lengths in self._trial_passes():
            for is_first in (True, False):  # the first pass of a kind makes what is made once
                trial, times = {object(): [0] * length for length in lengths}, PhaseTimes()
                try:
                    with times.measure("extend", context.device):
                        logits, _ = self._extend(trial, compares=False)
                        slots = self.state.slots(trial)
                        self.drafter.keep_logits(slots, logits)
                    if is_first:
                        self._warm_up_blocks(slots)
                        self._capture_passes(slots)
                    else:
                        self._warm_up_blocks(slots, sum(lengths), times.extend_s)
                finally:
                    for request in trial:
                        self.state.release(request)

    def _capture_passes(self, slots: Tensor) -> None:
        """Captures passes of all numbers of requests, with contexts where those of some slots are."""
        self._windows.capture(self.towers.context, self._max_pages)
        for size in sorted(self._block_sizes(), reverse=True):
            self.drafter.passes(size).capture(self.state.view(slots, size), self.state.num_slots, self._max_pages)

    def _trial_passes(self) -> list[list[int]]:
        """New tokens of the requests of each pass that `warm_up` makes, if the pool has room for it."""
        passes = [[1], [8] * 4, [8] * min(TRIAL_ROWS, self.state.num_slots), [64]]
        if use_triton(self.towers.context.embeddings):
            passes += [[17], [17, 1], [300, 17, 1], [300, 9, 1], [1100], [1] * self.state.num_slots]
        state = self.state
        return [
            lengths
            for lengths in passes
            if len(lengths) <= state.num_slots
            and sum(map(state.pages_for, lengths)) <= state.num_pages
            and sum(lengths) <= self._admission.token_budget
        ]

    def memory(self) -> DrafterMemory:
        """See `DraftingRounds.memory`."""
        context, denoiser = self.towers.context, self.towers.denoiser
        return DrafterMemory(
            context_tower_bytes=sum(parameter.nbytes for parameter in context.parameters()),
            state_bytes=self.state.nbytes + self.drafter.last_logits.nbytes,
            context_device=context.device,
            denoiser_tower_bytes=sum(parameter.nbytes for parameter in denoiser.parameters()),
            workspace_bytes=self.state.workspace_nbytes + self.drafter.nbytes,
            denoiser_device=denoiser.device,
            graphs_bytes=sum(graphs.nbytes for graphs in {self._graphs, self.drafter.graphs}),
        )

    def _num_unread(self, request_id: RequestId, num_tokens: int) -> int:
        return max(0, num_tokens - self.state.num_computed_tokens(request_id))

    def _read(self, wanting: Sequence[DraftRequest], times: PhaseTimes, plan: DraftPlan) -> Admitted:
        """Brings contexts up to date within the budget, in one pass."""
        with times.measure("extend", self.towers.context.device):
            admitted = self._admission.admit(wanting, plan.most_context_tokens)
            increments, in_time = admitted.increments, self.num_speculative_tokens + 1 if plan.num_tokens else 1
            if increments:
                late = [request_id for request_id in admitted.completed if len(increments[request_id]) > in_time]
                logits, picks = self._extend(increments, compares=bool(late))
                if picks is not None:
                    admitted.foreseen.update(foreseen_tokens(increments, picks.tolist(), late))
                place = {request_id: row for row, request_id in enumerate(increments)}
                rows = to_device([place[request_id] for request_id in admitted.completed], logits.device, torch.int64)
                self.drafter.keep_logits(self.state.slots(admitted.completed), logits[rows])
        return admitted

    def _extend(self, increments: Mapping[RequestId, Sequence[int]], compares: bool) -> tuple[Tensor, Tensor | None]:
        """Has the context tower read on.

        Args:
            increments: new tokens by request.
            compares: whether to say what it would have picked.

        Returns:
            Logits [num_reqs, vocab] behind the last tokens, and int64 [num_tokens], the most probable tokens behind
            all; None where nobody learns from them, or the pass is too long for that.
        """
        if not compares and self._windows.serve(increments):
            return self._windows.extend_known(self.towers.context, increments), None
        compares = compares and self.policy.learns_from_reading and sum(map(len, increments.values())) <= MOST_COMPARED
        logits = self.state.extend(self.towers.context, increments, "all" if compares else "last").logits
        assert logits is not None
        if not compares:
            return logits, None
        logits = logits.flatten(0, -2)
        ends = to_device(list(accumulate(map(len, increments.values()))), logits.device)
        return logits[ends - 1], logits.argmax(-1)

    def _restart(self, request_id: RequestId) -> None:
        self._admission.restart(request_id)


def foreseen_tokens(
    increments: Mapping[RequestId, TokenSequence], picks: Sequence[int], late: Collection[RequestId]
) -> dict[RequestId, list[bool]]:
    """Whether the context tower, which read increments one behind the other, would have picked their tokens.

    Args:
        increments: in the order of the pass.
        picks: after every token of it.
        late: requests that are asked for.
    """
    foreseen, start = {}, 0
    for request_id, tokens in increments.items():
        if request_id in late:
            own = picks[start : start + len(tokens) - 1]
            foreseen[request_id] = [pick == token for pick, token in zip(own, tokens[1:], strict=True)]
        start += len(tokens)
    return foreseen
