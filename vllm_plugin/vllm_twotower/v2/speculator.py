"""The speculator that vLLM's model runner V2 calls after every step: token ids on the device in, drafts out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from twotower_spec.drafting import AsyncRequest, AsyncRound, AsyncSession, DraftingRounds
from twotower_spec.state.transfer import Moment, moved, to_device
from twotower_spec.state.window import TokenTable
from vllm_twotower.drafter import EngineDrafter
from vllm_twotower.loading import load_session
from vllm_twotower.metrics import PLANNED
from vllm_twotower.v2 import hooks
from vllm_twotower.v2.history import KnownTokens, Step, TokenHistory


class TwoTowerSpeculator(EngineDrafter, BaseSpeculator):
    """Drafts for vLLM's V2 model runner.

    V2 verifies equally many drafts of all decoding requests of a step, as many as its scheduler has planned. A request
    without drafts gets its last token so many times, which costs verification and is worth nothing. The host goes ahead
    of the device: it reads nothing of a step in steady state, and learns what became of drafts when that has arrived, a
    step late.
    """

    # Read by the runner: no images, and drafts are one-hot.
    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any) -> None:
        """Checks the settings and hooks into the model runner, which is being made around it.

        Args:
            vllm_config: vLLM's; the knobs are in `additional_config["twotower"]`.
            device: of the verifier.
            req_states: vLLM's, of all requests.

        Raises:
            TwoTowerError: the settings are refused, or this vLLM lacks what drafting needs.
        """
        super().__init__(vllm_config)
        hooks.install()
        self.sampler: Any = None
        self._states, self._device = req_states, device
        self._max_model_len = int(vllm_config.model_config.max_model_len)
        self._history = TokenHistory(req_states, self.num_speculative_tokens + 1)
        self._drafts = torch.zeros(req_states.max_num_reqs, self.num_speculative_tokens, dtype=torch.int64).to(device)
        # When the drafts of `_round` were there.
        self._ended: Moment | None = None
        self._has_ranks = vllm_config.parallel_config.tensor_parallel_size > 1

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing of the drafter is in vLLM's graphs."""

    def capture(self) -> None:
        """Nothing of the drafter is in vLLM's graphs."""

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        """See `EngineDrafter`."""
        self.sampler = runner.rejection_sampler
        finished = getattr(scheduler_output, "finished_req_ids", None) or ()
        self.forget(finished)
        for request_id in finished:
            self._history.forget(request_id)
        # Those that were thrown out and come back are among them.
        for new in getattr(scheduler_output, "scheduled_new_reqs", None) or ():
            self._history.begin(new.req_id, getattr(new, "prefill_token_ids", None))

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        *others: Any,
        num_speculative_tokens: int | None = None,
        dummy_run: bool = False,
        **unused: Any,
    ) -> Tensor:
        """Drafts for the next step; never raises.

        Args:
            input_batch: vLLM's, of the step.
            attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_rejected, others, unused: not used.
            num_sampled: int32 [num_reqs], tokens that the step committed; 0 while a prompt is being read.
            last_sampled: int64 [max_num_reqs, 1], last token of every slot.
            num_speculative_tokens: drafts that the next step verifies, which the scheduler has decided; None for all.
            dummy_run: whether this is a trial without requests.

        Returns:
            int64 [num_reqs, num_speculative_tokens], all of them valid ids.
        """
        drafts = self._drafts[: input_batch.num_reqs]
        if dummy_run:
            return drafts
        self.count_sampler_failures(getattr(self.sampler, "num_failures", 0))
        drafts.copy_(last_sampled[input_batch.idx_mapping].expand_as(drafts))
        most = self.num_speculative_tokens if num_speculative_tokens is None else num_speculative_tokens
        planned = self._guarded(
            input_batch.num_reqs, lambda session: self._draft_ahead(session, input_batch, num_sampled, drafts, most), 0
        )
        self._count_safely(lambda: self.stats.set(PLANNED, planned))
        if self._has_ranks:  # every rank verifies what it holds itself
            get_tp_group().broadcast(drafts, src=0)
        return drafts

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """See `EngineDrafter.load`."""
        super().load(device, dtype)
        self.stats.set(PLANNED, self.num_speculative_tokens if self.session is not None else 0)

    def change_policy(self, changes: Mapping[str, Any]) -> None:
        """See `EngineDrafter.change_policy`; rounds under way are none of the policy's that takes over."""
        super().change_policy(changes)
        for step in self._history.under_way:
            step.drafted = None

    def _load_own_session(self, device: torch.device, dtype: torch.dtype) -> DraftingRounds:
        """See `EngineDrafter`."""
        most = self.num_speculative_tokens + 1
        return load_session(self.knobs, self._found, self._vllm_config, device, dtype, AsyncSession, most_per_step=most)

    def _draft_ahead(
        self, session: DraftingRounds, input_batch: Any, num_sampled: Tensor, drafts: Tensor, most: int
    ) -> int:
        """Drafts for a step whose results are not known, and learns of those before it.

        Args:
            session: ours.
            input_batch, num_sampled: as `propose` takes them.
            drafts: int64 [num_reqs, num_speculative_tokens], last tokens; drafts are put in their place.
            most: drafts that the next step verifies.

        Returns:
            How many drafts the scheduler should plan for.
        """
        assert isinstance(session, AsyncSession)
        self.forget(self._gone(session.request_ids))
        while (landed := self._history.next_landed()) is not None:
            self._settle(session, landed)
        step = self._history.follow(input_batch, num_sampled)
        self.stats.add("rounds", 1)
        if self._faults.skips_round():
            self.stats.add("fallbacks", len(step.known), "recovering")
            return 0
        requests = [
            AsyncRequest(
                request_id,
                known.slot,
                self._history.token_ids(known),
                self._history.most_tokens(known),
                read_only=not samples,
                wants_drafts=self._wants_drafts(known),
            )
            for request_id, known, samples in zip(step.request_ids, step.known, step.samples.tolist(), strict=True)
        ]
        table = TokenTable(self._states.all_token_ids.gpu, self._states.total_len.gpu)
        step.drafted = session.draft_ahead(requests, table, most)
        _fill(drafts, step.drafted, session.num_token_ids)
        step.ended = Moment(self._device)
        return min(step.drafted.num_planned, self.num_speculative_tokens)

    def _settle(self, session: AsyncSession, step: Step) -> None:
        """Learns of a step that is over: what it made of the drafts before it, and what its own drafts are."""
        finished, self._round = self._round, None
        # Where the scheduler did not know yet that nothing was drafted, the step is no measure of one without drafts.
        is_measure = finished is not None and (finished.plan is not None or not any(step.num_verified))
        if finished is not None and self._ended is not None and is_measure:
            self._observe(session, finished, self._ended.seconds_until(step.begun), step.outcomes())
        if step.drafted is None:
            return
        self._round = session.settle(step.drafted, self._history.token_ids_of(step.request_ids))
        self._ended = step.ended
        self._faults.judge(self._round)
        self._count(session, self._round, self._round.host_s)

    def _gone(self, request_ids: Iterable[Hashable]) -> list[Hashable]:
        """Requests that vLLM has forgotten, which are also those that it has thrown out for a while."""
        return [request_id for request_id in request_ids if request_id not in self._states.req_id_to_index]

    def _wants_drafts(self, known: KnownTokens) -> bool:
        """Whether drafts of a request may be accepted, before max_model_len or its max_tokens ends it."""
        end = min(self._max_model_len, int(self._states.max_seq_len[known.slot]))
        return getattr(self.sampler, "takes_drafts", lambda slot: True)(known.slot) and end - known.length > 1


def _fill(drafts: Tensor, drafted: AsyncRound, num_token_ids: int) -> None:
    """Puts a round's drafts where they belong; where they are too few the last of them stands again.

    They are made ids that can be embedded, whatever has become of them: the host will know when it is too late.
    """
    if drafted.token_ids is None or drafted.usable is None:
        return
    rows = to_device(np.array(drafted.rows), drafts.device)
    own = moved(drafted.token_ids, drafts.device)[:, : drafts.shape[1]].clamp(0, num_token_ids - 1)
    missing = drafts.shape[1] - own.shape[1]
    own = torch.cat([own, own[:, -1:].expand(-1, missing)], dim=1)
    drafts[rows] = torch.where(moved(drafted.usable, drafts.device), own, drafts[rows])
