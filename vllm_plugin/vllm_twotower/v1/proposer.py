"""The proposer that vLLM's model runner V1 calls after every step: rows of token ids in, draft token ids out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from twotower_spec.drafting import DraftingRounds, DraftRequest
from vllm_twotower.drafter import EngineDrafter, Outcome, StepRow, filled
from vllm_twotower.v1 import hooks, one_tower
from vllm_twotower.v1.engine_context import EngineContext
from vllm_twotower.v1.requests import gone, usable_drafts
from vllm_twotower.v1.sampler import TwoTowerRejectionSampler

# Where vLLM stops to ask a drafter that could outgrow it; ours takes rows of any length.
ANY_LENGTH = 10**9


class TwoTowerProposer(EngineDrafter):
    """Drafts for vLLM's V1 model runner (speculative method `custom_class`).

    Drafts of rank 0 reach all ranks through the scheduler.
    """

    def __init__(self, vllm_config: Any) -> None:
        """Checks the settings and hooks into the model runner, which is being made around it.

        Args:
            vllm_config: vLLM's; the knobs are in `additional_config["twotower"]`.

        Raises:
            TwoTowerError: the settings are refused.
        """
        super().__init__(vllm_config)
        self._pads = self.knobs.pads_drafts(vllm_config)
        self._runner: Any = None
        self._scheduled: Mapping[Any, Sequence[int]] = {}
        self._hooked = hooks.install(is_hybrid=vllm_config.model_config.is_hybrid)

    def load_model(self, target_model: Any) -> None:
        """Loads the drafter.

        Args:
            target_model: vLLM's verifier, on its device.

        Raises:
            TwoTowerError: the checkpoint is refused. Any other failure leaves vLLM without drafts.
        """
        if self._hooked:
            parameter = next(iter(target_model.parameters()))
            self.load(parameter.device, parameter.dtype)

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        """See `EngineDrafter`."""
        self._scheduled = getattr(scheduler_output, "scheduled_spec_decode_tokens", None) or {}
        self.forget(getattr(scheduler_output, "finished_req_ids", None) or ())
        if self._runner is not runner:
            self._runner = runner
            runner.effective_drafter_max_model_len = ANY_LENGTH
            sampler = getattr(runner, "rejection_sampler", None)
            if isinstance(sampler, TwoTowerRejectionSampler):
                sampler.attach(runner, self.knobs.verification)
            self._attach_state(runner)

    def _load_hosted_session(self, device: torch.device, dtype: torch.dtype) -> DraftingRounds | str:
        """See `EngineDrafter`."""
        arguments = self.knobs, self._found, self._vllm_config, device, dtype
        return one_tower.obstacle(*arguments) or one_tower.load_hosted_session(*arguments)

    def _attach_state(self, runner: Any) -> None:
        """Has the drafter read the verifier's state; where that fails, vLLM goes on without drafts."""
        source = self.session.source if self.session else None
        if not isinstance(source, EngineContext):
            return
        try:
            source.attach(runner)
        except Exception as error:
            self._faults.log(error, "the verifier's state cannot be read; vLLM goes on without drafts")
            self.session = None

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: npt.NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for the next step; never raises.

        Args:
            sampled_token_ids: per row, what the last step committed; empty while its prompt is being read.
            num_tokens_no_spec: int32 [max_num_seqs], length of every row, those tokens included.
            token_ids_cpu: int32 [max_num_seqs, max_model_len], rows of token ids; read only.
            slot_mappings: not used.

        Returns:
            Per row, up to `num_speculative_tokens` drafts.
        """
        self.count_sampler_failures(getattr(getattr(self._runner, "rejection_sampler", None), "num_failures", 0))
        return self.draft(
            len(sampled_token_ids),
            lambda: self._rows(sampled_token_ids, num_tokens_no_spec, token_ids_cpu),
            lambda held: gone(held, self._runner),
        )

    def _as_given(self, drafts: list[list[int]], rows: Sequence[StepRow]) -> list[list[int]]:
        """See `EngineDrafter`."""
        return padded(drafts, rows) if self._pads else drafts

    def _reason_to_rest(self) -> str | None:
        reason = super()._reason_to_rest()
        return "no runner" if reason is None and self._runner is None else reason

    def _rows(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: npt.NDArray[np.int32],
    ) -> list[StepRow]:
        request_ids: list[str] = self._runner.input_batch.req_ids[: len(sampled_token_ids)]
        lengths: list[int] = num_tokens_no_spec[: len(request_ids)].tolist()
        return [
            StepRow(
                DraftRequest(
                    request_id,
                    token_ids_cpu[row, :length],
                    usable_drafts(self._runner, request_id, length, self.num_speculative_tokens),
                    read_only=not sampled,
                ),
                Outcome(len(sampled), len(self._scheduled.get(request_id) or ())),
            )
            for row, (request_id, length, sampled) in enumerate(
                zip(request_ids, lengths, sampled_token_ids, strict=True)
            )
        ]


def padded(drafts: list[list[int]], rows: Sequence[StepRow]) -> list[list[int]]:
    """Gives every decoding row as many drafts as it can use, for which vLLM has a CUDA graph of the whole step."""
    if not any(drafts):
        return drafts
    return [
        filled(own, row.request, row.request.max_draft_tokens or 0) if row.outcome.num_sampled else own
        for own, row in zip(drafts, rows, strict=True)
    ]
