"""Our rejection sampler in vLLM's place: it reads raw logits once and draws with noise that needs no generator."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.rejection_sampler import RejectionSampler

from twotower_kernels.acceptance import AcceptanceRule, SamplingTensors, accept, filtered_logits
from twotower_spec.state.transfer import moved, to_device
from vllm_twotower.faults import traceback_of
from vllm_twotower.seeds import request_seed

logger = init_logger("vllm.twotower.sampler")


class TwoTowerRejectionSampler(RejectionSampler):
    """Greedy, one-hot and coupled verification, each request with its own parameters.

    vLLM's own processors (penalties, bad words, allowed tokens, min_tokens) are applied first where a request asks for
    them. min_p, logit_bias and logprob_token_ids, which vLLM lacks with speculative decoding, are covered here. Handed
    to vLLM's own: lossy verification (synthetic, fly), drafts with probabilities, and whatever fails in here (logged
    once, counted). What becomes of every parameter is in `vllm_twotower.sampling_parameters`.
    """

    _runner: Any = None
    _acceptance_rule: AcceptanceRule = "one-hot"
    _batch: _RequestBatch | None = None
    num_failures = 0

    def attach(self, runner: Any, acceptance_rule: AcceptanceRule) -> None:
        """Tells whose requests are sampled; until then vLLM's own sampler works."""
        self._runner, self._acceptance_rule = runner, acceptance_rule

    def forward(self, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any) -> Any:
        """See `RejectionSampler.forward`; `logits` are not modified."""
        lossy = self.synthetic_mode or getattr(self, "use_fly", False)
        if draft_probs is None and not lossy:
            try:
                output = self._verify(metadata, logits, sampling_metadata)
            except Exception as error:
                self.num_failures += 1
                if self.num_failures == 1:
                    logger.error(
                        "TwoTower's sampler failed and vLLM's own took over; please report this\n%s",
                        traceback_of(error),
                    )
                output = None
            if output is not None:
                return output
        # It does not know them, and fails at a request that asks for other log-probabilities too.
        known = replace(sampling_metadata, logprob_token_ids=None)
        return super().forward(metadata, draft_probs, logits, known)

    def _verify(self, metadata: Any, logits: Tensor, sampling_metadata: Any) -> Any | None:
        counts = metadata.num_draft_tokens
        if self._runner is None or self._runner.input_batch.num_reqs != len(counts):
            return None  # a trial run at start, without requests
        batch = self._batch
        if batch is None or batch.sampling_metadata is not sampling_metadata:
            batch = self._batch = _RequestBatch.of(self._runner, sampling_metadata, logits.device)
        wants_logprobs = sampling_metadata.max_num_logprobs is not None or bool(sampling_metadata.logprob_token_ids)
        changes_logits = bool(batch.logit_bias) or _has_processors(sampling_metadata)
        if not (metadata.max_spec_len or wants_logprobs or changes_logits) and sampling_metadata.all_greedy:
            # As `accept` does, in a quarter of the time: where drafting rests, every step comes here.
            token_ids = logits.argmax(dim=-1, keepdim=True).to(torch.int32)
            return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=None)
        lengths = torch.from_numpy(self._runner.input_batch.num_tokens_no_spec[: len(counts)]).long()
        if logits.is_cuda:
            lengths = lengths.pin_memory()  # from pageable memory the copy would wait for the verifier's pass
        sampling = batch.sampling(moved(lengths, logits.device))
        processed = self._processed(metadata, logits, sampling_metadata, batch) if changes_logits else logits
        token_ids = accept(
            processed,
            metadata.draft_token_ids,
            metadata.cu_num_draft_tokens,
            metadata.max_spec_len,
            sampling,
            self._acceptance_rule,
        ).token_ids
        if not wants_logprobs:
            return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=None)
        shown = logits
        if self.is_processed_logprobs_mode:
            request = np.repeat(np.arange(len(counts)), np.array(counts) + 1)
            shown = filtered_logits(processed, to_device(request, logits.device), sampling)
        logprobs = self._logprobs(metadata, shown, token_ids, sampling_metadata)
        return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=logprobs)

    def _logprobs(self, metadata: Any, shown: Tensor, token_ids: Tensor, sampling_metadata: Any) -> Any:
        """Log-probabilities of every sampled token and of those beside it, which are the most probable or named ones.

        Args:
            metadata: vLLM's, of the drafts.
            shown: logits [num_rows, vocab] that they are taken from.
            token_ids: int32 [num_reqs, width], what was sampled, then -1.
            sampling_metadata: vLLM's, with `max_num_logprobs` and `logprob_token_ids`.

        Returns:
            `LogprobsTensors` with a row for each of `token_ids`, of which vLLM leaves out those of -1.
        """
        most_probable, named = sampling_metadata.max_num_logprobs, sampling_metadata.logprob_token_ids
        width = token_ids.shape[1]
        first = F.pad(metadata.cu_num_sampled_tokens[:-1], (1, 0))
        rows = (first[:, None] + torch.arange(width, device=first.device)).flatten().clamp_(max=len(shown) - 1)
        sampled = token_ids.flatten().long().clamp_(min=0)
        values = shown[rows].to(torch.float32)
        if not self.is_logits_logprobs_mode:
            values = self.sampler.compute_logprobs(values)
        found = self.sampler.gather_logprobs(values, most_probable or 0, sampled)
        if not named:
            return found
        of_rows = {request * width + i: ids for request, ids in named.items() for i in range(width)}
        return joined(found, self.sampler.gather_specific_token_logprobs(values, of_rows, sampled), of_rows)

    def _processed(self, metadata: Any, logits: Tensor, sampling_metadata: Any, batch: _RequestBatch) -> Tensor:
        """Logits after vLLM's processors, float32."""
        out = logits.to(torch.float32, copy=True)
        start = 0
        for request, count in enumerate(metadata.num_draft_tokens):
            if request in batch.logit_bias:
                tokens, biases = batch.logit_bias[request]
                out[start : start + count + 1, tokens] += biases
            start += count + 1
        at_drafts, after_them = metadata.target_logits_indices, metadata.bonus_logits_indices
        budgets = sampling_metadata.thinking_budget_state_holder
        others = replace(sampling_metadata, thinking_budget_state_holder=None)
        after = self.sampler.apply_logits_processors(out[after_them], others, True)
        out[after_them] = after if budgets is None else with_budgets(budgets, after, sampling_metadata.output_token_ids)
        if len(at_drafts):
            out[at_drafts] = self.apply_logits_processors(out[at_drafts], others, metadata)
        return out


@dataclass(frozen=True)
class _RequestBatch:
    """Values that stay the same in every step until the requests of the batch change.

    Attributes:
        sampling_metadata: vLLM's, made anew when they change.
        seeds, min_p: as in `SamplingTensors`.
        logit_bias: per request that has one, token ids and what is added to their logits.
    """

    sampling_metadata: Any
    seeds: Tensor
    min_p: Tensor | None
    logit_bias: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, runner: Any, sampling_metadata: Any, device: torch.device) -> _RequestBatch:
        request_ids = runner.input_batch.req_ids
        params = [runner.requests[request_id].sampling_params for request_id in request_ids]
        engine_seed = runner.vllm_config.model_config.seed
        seeds = [
            request_seed(one.seed, engine_seed, request_id) for request_id, one in zip(request_ids, params, strict=True)
        ]
        min_p = [one.min_p for one in params]
        biases = {
            i: (
                to_device(list(one.logit_bias), device),
                to_device(list(one.logit_bias.values()), device, torch.float32),
            )
            for i, one in enumerate(params)
            if one.logit_bias
        }
        return cls(
            sampling_metadata,
            to_device(seeds, device, torch.int64),
            to_device(min_p, device, torch.float32) if any(min_p) else None,
            biases,
        )

    def sampling(self, positions: Tensor) -> SamplingTensors:
        """Parameters of a step whose first tokens have these positions."""
        given = self.sampling_metadata
        temperature = None if given.all_greedy else given.temperature
        return SamplingTensors(temperature, given.top_k, given.top_p, self.min_p, self.seeds, positions)


def with_budgets(budgets: Any, logits: Tensor, output_token_ids: list[list[int]]) -> Tensor:
    """Logits after thinking budgets, as vLLM applies them without speculative decoding.

    Its way with drafts forces the first token of an end phrase alone, and not even that after a prompt that is read in
    pieces. Requests with a budget get no drafts, so that the way without them fits.

    Args:
        budgets: vLLM's state of all requests of the step.
        logits: float32 [num_reqs, vocab], after all drafts; modified.
        output_token_ids: what every request has written.
    """
    budgets.in_spec_mode = False
    budgets.update_state(output_token_ids, None)
    result: Tensor = budgets.apply_to_logits(logits, predict_bonus_token=False, spec_token_ids=None)
    return result


def joined(found: Any, others: Any, rows: Collection[int]) -> Any:
    """`LogprobsTensors` with some rows of others; vLLM reads as many columns of a row as its request asked for."""
    width = max(found.logprobs.shape[1], others.logprobs.shape[1])
    is_other = torch.zeros(len(found.logprobs), 1, dtype=torch.bool)
    is_other[list(rows)] = True
    is_other = moved(is_other, found.logprobs.device)

    def wide(values: Tensor, fill: float) -> Tensor:
        return F.pad(values, (0, width - values.shape[1]), value=fill)

    return LogprobsTensors(
        torch.where(is_other, wide(others.logprob_token_ids, 0), wide(found.logprob_token_ids, 0)),
        torch.where(is_other, wide(others.logprobs, -torch.inf), wide(found.logprobs, -torch.inf)),
        found.selected_token_ranks,
    )


def _has_processors(sampling_metadata: Any) -> bool:
    """Whether a request of the batch asks for something that changes logits."""
    budgets = sampling_metadata.thinking_budget_state_holder
    return (
        not sampling_metadata.no_penalties
        or bool(sampling_metadata.bad_words_token_ids)
        or sampling_metadata.allowed_token_ids_mask is not None
        or any(getattr(one, "min_toks", True) for one in sampling_metadata.logitsprocs.non_argmax_invariant)
        or (budgets is not None and budgets.has_tracked_requests())
    )
