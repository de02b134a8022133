"""The speculator that vLLM's model runner V2 calls after every step: token ids on the device in, drafts out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from twotower_spec.drafting import DraftRequest
from vllm_twotower.drafter import EngineDrafter, StepRow, filled
from vllm_twotower.v2 import hooks
from vllm_twotower.v2.history import TokenHistory

# Stands in a row without drafts, before it leaves the host.
NO_DRAFT = -1


class TwoTowerSpeculator(EngineDrafter, BaseSpeculator):
    """Drafts for vLLM's V2 model runner.

    V2 verifies `num_speculative_tokens` drafts of every decoding request in every step. A request without drafts gets
    its last token so many times, which costs verification and is worth nothing.
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
        self._has_ranks = vllm_config.parallel_config.tensor_parallel_size > 1

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing of the drafter is in vLLM's graphs."""

    def capture(self) -> None:
        """Nothing of the drafter is in vLLM's graphs."""

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        """Told by the hook of `execute_model` before every step, also of one that runs nothing; never raises."""
        self.sampler = runner.rejection_sampler
        finished = getattr(scheduler_output, "finished_req_ids", None) or ()
        self.forget(finished)
        for request_id in finished:
            self._history.forget(request_id)
        # Those that were thrown out and come back are among them.
        for new in getattr(scheduler_output, "scheduled_new_reqs", None) or ():
            self._history.forget(new.req_id)

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
        dummy_run: bool = False,
        **unused: Any,
    ) -> Tensor:
        """Drafts for the next step; never raises.

        Args:
            input_batch: vLLM's, of the step.
            attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_rejected, others, unused: not used.
            num_sampled: int32 [num_reqs], tokens that the step committed; 0 while a prompt is being read.
            last_sampled: int64 [max_num_reqs, 1], last token of every slot.
            dummy_run: whether this is a trial without requests.

        Returns:
            int64 [num_reqs, num_speculative_tokens], all of them valid ids.
        """
        drafts = self._drafts[: input_batch.num_reqs]
        if dummy_run:
            return drafts
        self.count_sampler_failures(getattr(self.sampler, "num_failures", 0))
        own, rows = self.draft(input_batch.num_reqs, lambda: self._rows(input_batch, num_sampled), self._gone)
        drafts.copy_(last_sampled[input_batch.idx_mapping].expand_as(drafts))
        if any(own):
            width = self.num_speculative_tokens
            full = [
                filled(one, row.request, width) if one else [NO_DRAFT] * width
                for one, row in zip(own, rows, strict=True)
            ]
            wanted = async_tensor_h2d(np.array(full, dtype=np.int64), device=self._device)
            drafts.copy_(torch.where(wanted == NO_DRAFT, drafts, wanted))
        if self._has_ranks:  # every rank verifies what it holds itself
            get_tp_group().broadcast(drafts, src=0)
        return drafts

    def _gone(self, request_ids: Iterable[Hashable]) -> list[Hashable]:
        """Requests that vLLM has forgotten, which are also those that it has thrown out for a while."""
        return [request_id for request_id in request_ids if request_id not in self._states.req_id_to_index]

    def _rows(self, input_batch: Any, num_sampled: Tensor) -> list[StepRow]:
        request_ids, slots = list(input_batch.req_ids), input_batch.idx_mapping_np.tolist()
        step = self._history.read(request_ids, slots, input_batch.idx_mapping, num_sampled)
        verified = (np.diff(input_batch.cu_num_logits_np) - 1).tolist()
        return [
            StepRow(
                DraftRequest(request_id, token_ids, self._usable_drafts(slot, len(token_ids)), read_only=not sampled),
                num_sampled=sampled,
                num_verified=drafts,
            )
            for request_id, slot, token_ids, sampled, drafts in zip(
                request_ids, slots, step.token_ids, step.num_sampled, verified, strict=True
            )
        ]

    def _usable_drafts(self, slot: int, num_tokens: int) -> int:
        """How many drafts a request can still use before max_model_len or its max_tokens ends it; 0 for some rules."""
        if not getattr(self.sampler, "takes_drafts", lambda slot: True)(slot):
            return 0
        end = min(self._max_model_len, int(self._states.max_seq_len[slot]))
        return max(0, min(self.num_speculative_tokens, end - num_tokens - 1))
