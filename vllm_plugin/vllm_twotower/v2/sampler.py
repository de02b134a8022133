"""Our samplers in the place of those of vLLM's model runner V2: raw logits are read once, noise needs no generator.

V2 has one for steps with drafts and one for those without, as is every request's first. With both of them ours a seed
gives one text, whatever was drafted, and the text of V1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, gather_draft_sampled

from twotower_kernels.acceptance import SamplingTensors, accept, filtered_logits
from vllm_twotower.config import DrafterKnobs, knobs_in
from vllm_twotower.faults import traceback_of
from vllm_twotower.sampling_parameters import allows_drafts
from vllm_twotower.seeds import request_seed

logger = init_logger("vllm.twotower.sampler")


class RequestParameters(SamplingStates):
    """Sampling parameters by slot, with seeds as V1 has them.

    Attributes:
        takes_drafts: bool [max_num_reqs], whether drafts of a request may be accepted.
    """

    def __init__(self, req_states: Any, vocab_size: int, engine_seed: int | None) -> None:
        super().__init__(req_states.max_num_reqs, vocab_size)
        self._req_states, self._engine_seed = req_states, engine_seed
        self.takes_drafts = np.ones(req_states.max_num_reqs, dtype=np.bool_)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Sets the parameters of a new request; False, because none of these needs a copy of the logits with us."""
        super().add_request(req_idx, sampling_params)
        request_id = self._req_states.index_to_req_id[req_idx]
        self.seeds.np[req_idx] = request_seed(sampling_params.seed, self._engine_seed, request_id)
        self.takes_drafts[req_idx] = allows_drafts(sampling_params)
        return False


class TwoTowerSampler(Sampler):
    """Sampler of steps without drafts; the work is the rejection sampler's."""

    verifier: TwoTowerRejectionSampler | None = None

    def __init__(self, vllm_config: Any, **given: Any) -> None:
        """Makes vLLM's sampler; arguments as of `Sampler`."""
        super().__init__(vllm_config=vllm_config, **given)
        self.acceptance_rule = DrafterKnobs.parse(knobs_in(vllm_config.additional_config)).verification
        self.sampling_states: Any = RequestParameters(
            self.req_states, self.req_states.vocab_size, vllm_config.model_config.seed
        )

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        """See `Sampler`; `logits` are not modified."""
        output = None if self.verifier is None else self.verifier.verify(logits, input_batch)
        return super().__call__(logits, input_batch) if output is None else output


class TwoTowerRejectionSampler(RejectionSampler):
    """Greedy, one-hot and coupled verification, each request with its own parameters.

    vLLM's own processors of logits are applied first where a request asks for them. Handed to vLLM's own sampler: lossy
    verification (synthetic, fly), drafts with probabilities, masks of what was sampled from, replayed traces, and
    whatever fails in here (logged once, counted).
    """

    num_failures = 0

    def __init__(self, sampler: TwoTowerSampler, spec_config: Any, *args: Any, **kwargs: Any) -> None:
        """Makes vLLM's rejection sampler; arguments as of `RejectionSampler`."""
        super().__init__(sampler, spec_config, *args, **kwargs)
        self._is_lossy = spec_config.rejection_sample_method != "standard"
        sampler.verifier = self

    def __call__(
        self, logits: Tensor, input_batch: Any, draft_logits: Tensor | None = None, invalid_drafts: Tensor | None = None
    ) -> Any:
        """See `RejectionSampler`; `logits` are not modified."""
        output = None if draft_logits is not None else self.verify(logits, input_batch, invalid_drafts)
        if output is None:
            return super().__call__(logits, input_batch, draft_logits, invalid_drafts)
        return output

    def takes_drafts(self, slot: int) -> bool:
        """Whether drafts of the request in a slot may be accepted."""
        return bool(self.sampler.sampling_states.takes_drafts[slot])

    def verify(self, logits: Tensor, input_batch: Any, invalid_drafts: Tensor | None = None) -> Any | None:
        """Samples every request's tokens; None for what vLLM's own sampler is to do.

        Args:
            logits: float [num_logits, vocab]; a request's rows together, one before each draft and one after all.
            input_batch: vLLM's.
            invalid_drafts: bool [num_logits], rows whose drafts may not be accepted; None for none.
        """
        if self._is_lossy or self.sampler.return_sampling_mask or self.sampler.trace_replay_state is not None:
            return None
        try:
            return self._accept(logits, input_batch, invalid_drafts)
        except Exception as error:
            self.num_failures += 1
            if self.num_failures == 1:
                logger.error(
                    "TwoTower's sampler failed and vLLM's own took over; please report this\n%s", traceback_of(error)
                )
            # From now on vLLM's own sampler may have to apply temperatures and filters, for which it asks this.
            self.sampler.needs_logits_processing.fill(True)
            return None

    def _accept(self, logits: Tensor, input_batch: Any, invalid_drafts: Tensor | None) -> Any:
        num_nans = get_num_nans(logits) if self.sampler.compute_nans else None
        states = self.sampler.sampling_states
        idx, slots = input_batch.idx_mapping, input_batch.idx_mapping_np
        prefill_len = self.sampler.req_states.prefill_len.gpu
        # Token that each row reads, and its position: the last committed one, then the drafts.
        tokens, positions = gather_draft_sampled(
            input_batch.input_ids,
            input_batch.positions,
            input_batch.logits_indices,
            input_batch.expanded_idx_mapping,
            input_batch.expanded_local_pos,
            prefill_len,
        )
        rows = _Rows.of(input_batch, states.takes_drafts[slots], logits.device)
        judged = tokens if invalid_drafts is None else tokens.masked_fill(invalid_drafts, -1)
        sampling = self._sampling(slots, idx, positions[rows.first].long() + 1)
        processed = self._processed(logits, tokens, positions, input_batch)
        accepted = accept(
            processed,
            judged[rows.of_drafts].masked_fill(rows.is_refused, -1),
            rows.cu_num_drafts,
            self.num_speculative_steps if len(rows.of_drafts) else 0,
            sampling,
            self.sampler.acceptance_rule,
        )
        token_ids = accepted.token_ids.long()
        logprobs = self._logprobs(logits, processed, token_ids, rows.request, sampling, input_batch)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            accepted.num_accepted + 1, input_batch.seq_lens, input_batch.cu_num_logits, idx, prefill_len
        )
        return SamplerOutput(
            sampled_token_ids=token_ids,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _sampling(self, slots: npt.NDArray[np.intp], idx: Tensor, positions: Tensor) -> SamplingTensors:
        """Parameters of the requests of a step; None where one holds for none of them, which the host knows."""
        states = self.sampler.sampling_states

        def some(values: Any, neutral: float) -> Tensor | None:
            return values.gpu[idx] if np.any(values.np[slots] != neutral) else None

        return SamplingTensors(
            some(states.temperature, 0.0),
            some(states.top_k, states.vocab_size),
            some(states.top_p, 1.0),
            some(states.min_p, 0.0),
            states.seeds.gpu[idx],
            positions,
        )

    def _processed(self, logits: Tensor, tokens: Tensor, positions: Tensor, input_batch: Any) -> Tensor:
        """Logits after vLLM's processors, float32; the logits themselves where there are none."""
        sampler = self.sampler
        if not np.any(sampler.needs_logits_processing[input_batch.idx_mapping_np]):
            return logits
        out = logits.to(torch.float32, copy=True)
        context = LogitsContext(
            expanded_idx_mapping=input_batch.expanded_idx_mapping,
            idx_mapping=input_batch.idx_mapping,
            idx_mapping_np=input_batch.idx_mapping_np,
            expanded_local_pos=input_batch.expanded_local_pos,
            input_ids=tokens,
            pos=positions,
            seq_lens_upper_bound_np=input_batch.seq_lens_cpu_upper_bound.numpy(),
        )
        for processor in sampler.logits_processors:
            out = processor.apply(out, context)
        sampler.thinking_budget_state.apply(out, context)
        return out

    def _logprobs(
        self,
        logits: Tensor,
        processed: Tensor,
        token_ids: Tensor,
        request: Tensor,
        sampling: SamplingTensors,
        input_batch: Any,
    ) -> Any | None:
        """Log-probabilities of every row's token and of those beside it, the most probable or named ones."""
        sampler, rows = self.sampler, input_batch.cu_num_logits_np
        dimensions = sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        if dimensions is None:
            return None
        num_logprobs, num_named = dimensions
        is_processed = sampler.logprobs_mode.startswith("processed")
        return compute_topk_scores(
            filtered_logits(processed, request, sampling) if is_processed else logits,
            num_logprobs,
            token_ids[request, input_batch.expanded_local_pos.long()].clamp_(min=0),
            rows.tolist() if len(logits) != input_batch.num_reqs else None,
            logprob_token_ids_state=sampler.logprob_token_ids_state,
            expanded_idx_mapping=input_batch.expanded_idx_mapping,
            max_per_req_token_ids=num_named,
            logits_mode=sampler.logprobs_mode.endswith("logits"),
        )


class _Rows:
    """Layout of a step's logits, made on the host, which knows it, so that nothing waits.

    Attributes:
        first: int64 [num_reqs], first row of every request.
        request: int64 [num_logits], whose row it is.
        of_drafts: int64 [num_drafts], rows that read a draft.
        is_refused: bool [num_drafts], whether the request takes no drafts.
        cu_num_drafts: int32 [num_reqs], drafts of each request and all before it.
    """

    def __init__(self, first: Tensor, request: Tensor, of_drafts: Tensor, is_refused: Tensor, cu: Tensor) -> None:
        self.first, self.request, self.of_drafts, self.is_refused = first, request, of_drafts, is_refused
        self.cu_num_drafts = cu

    @classmethod
    def of(cls, input_batch: Any, takes_drafts: npt.NDArray[np.bool_], device: torch.device) -> _Rows:
        ends = input_batch.cu_num_logits_np.astype(np.int64)
        request = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        of_drafts = np.delete(np.arange(ends[-1]), ends[:-1])
        return cls(
            async_tensor_h2d(ends[:-1], device=device),
            async_tensor_h2d(request, device=device),
            async_tensor_h2d(of_drafts, device=device),
            async_tensor_h2d(~takes_drafts[request[of_drafts]], device=device),
            async_tensor_h2d((ends[1:] - np.arange(1, len(ends))).astype(np.int32), device=device),
        )
