"""Our rejection sampler in vLLM's place: it reads raw logits once and draws with noise that needs no generator."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.rejection_sampler import RejectionSampler

from twotower_kernels.acceptance import AcceptanceRule, SamplingTensors, accept, filtered_logits
from twotower_spec.generation.sampling import signed_seed

logger = init_logger("vllm.twotower.sampler")


class TwoTowerRejectionSampler(RejectionSampler):
    """Greedy, one-hot and coupled verification, each request with its own parameters.

    vLLM's own processors (penalties, bad words, allowed tokens, min_tokens) are applied first where a request asks for
    them. min_p and logit_bias, which vLLM refuses with speculative decoding, are covered here. Handed to vLLM's own:
    lossy verification (synthetic, fly), drafts with probabilities, and whatever fails in here (logged once, counted).
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
            except Exception:
                self.num_failures += 1
                if self.num_failures == 1:
                    logger.exception("TwoTower's sampler failed and vLLM's own took over; please report this")
                output = None
            if output is not None:
                return output
        return super().forward(metadata, draft_probs, logits, sampling_metadata)

    def _verify(self, metadata: Any, logits: Tensor, sampling_metadata: Any) -> Any | None:
        counts = metadata.num_draft_tokens
        if self._runner is None or self._runner.input_batch.num_reqs != len(counts):
            return None  # a trial run at start, without requests
        batch = self._batch
        if batch is None or batch.sampling_metadata is not sampling_metadata:
            batch = self._batch = _RequestBatch.of(self._runner, sampling_metadata, logits.device)
        lengths = torch.from_numpy(self._runner.input_batch.num_tokens_no_spec[: len(counts)]).long()
        if logits.is_cuda:
            lengths = lengths.pin_memory()  # from pageable memory the copy would wait for the verifier's pass
        sampling = batch.sampling(lengths.to(logits.device, non_blocking=True))
        processed = self._processed(metadata, logits, sampling_metadata, batch)
        token_ids = accept(
            processed,
            metadata.draft_token_ids,
            metadata.cu_num_draft_tokens,
            metadata.max_spec_len,
            sampling,
            self._acceptance_rule,
        ).token_ids
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            shown = logits
            if self.is_processed_logprobs_mode:
                widths = torch.tensor(counts, device=logits.device) + 1
                request = torch.arange(len(counts), device=logits.device).repeat_interleave(widths)
                shown = filtered_logits(processed, request, sampling)
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                shown[metadata.target_logits_indices],
                shown[metadata.bonus_logits_indices],
                token_ids,
            )
        return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=logprobs)

    def _processed(self, metadata: Any, logits: Tensor, sampling_metadata: Any, batch: _RequestBatch) -> Tensor:
        """Logits after vLLM's processors, float32; the logits themselves where there are none."""
        if not batch.logit_bias and not _has_processors(sampling_metadata):
            return logits
        out = logits.to(torch.float32, copy=True)
        start = 0
        for request, count in enumerate(metadata.num_draft_tokens):
            if request in batch.logit_bias:
                tokens, biases = batch.logit_bias[request]
                out[start : start + count + 1, tokens] += biases
            start += count + 1
        at_drafts, after_them = metadata.target_logits_indices, metadata.bonus_logits_indices
        # In vLLM's order: the former brings thinking budgets up to date, which the latter only reads.
        out[after_them] = self.sampler.apply_logits_processors(out[after_them], sampling_metadata, True)
        if len(at_drafts):
            out[at_drafts] = self.apply_logits_processors(out[at_drafts], sampling_metadata, metadata)
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
            own_seed(engine_seed, request_id) if one.seed is None else signed_seed(one.seed)
            for request_id, one in zip(request_ids, params, strict=True)
        ]
        min_p = [one.min_p for one in params]
        biases = {
            i: (
                torch.tensor(list(one.logit_bias), device=device),
                torch.tensor(list(one.logit_bias.values())).to(device),
            )
            for i, one in enumerate(params)
            if one.logit_bias
        }
        return cls(
            sampling_metadata,
            torch.tensor(seeds, dtype=torch.int64, device=device),
            torch.tensor(min_p, dtype=torch.float32, device=device) if any(min_p) else None,
            biases,
        )

    def sampling(self, positions: Tensor) -> SamplingTensors:
        """Parameters of a step whose first tokens have these positions."""
        given = self.sampling_metadata
        temperature = None if given.all_greedy else given.temperature
        return SamplingTensors(temperature, given.top_k, given.top_p, self.min_p, self.seeds, positions)


def own_seed(engine_seed: int | None, request_id: str) -> int:
    """Seed of a request that brings none: the same on all ranks, another one for every request."""
    digest = hashlib.blake2b(f"{engine_seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _has_processors(sampling_metadata: Any) -> bool:
    """Whether a request of the batch asks for something that changes logits."""
    holder = getattr(sampling_metadata, "thinking_budget_state_holder", None)
    return (
        not sampling_metadata.no_penalties
        or bool(sampling_metadata.bad_words_token_ids)
        or sampling_metadata.allowed_token_ids_mask is not None
        or any(getattr(one, "min_toks", True) for one in sampling_metadata.logitsprocs.non_argmax_invariant)
        or (holder is not None and holder.has_tracked_requests())
    )
