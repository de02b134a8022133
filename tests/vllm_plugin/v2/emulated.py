"""Steps of vLLM's model runner V2 with our sampler and speculator, without a model: on a CPU, and on emulated devices.

vLLM's own request states, inputs and samplers are used; what stands in for a verifier is a table of logits by token.
It is a process by itself, `python -m tests.vllm_plugin.v2.emulated RUNS FILE` with the variables of `TRITON_ON_CPU`:
what vLLM does for its runners on a CPU takes devices away. RUNS is a JSON list of arguments of `steps`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from interpreted_triton import repairs
from torch import Tensor
from vllm import SamplingParams
from vllm.utils import torch_utils
from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers, post_update
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner
from vllm.v1.worker.gpu.states import RequestState

from tests.cuda.paths import PROMPTS, placed
from tests.support.cuda import Usage, emulated_devices
from tests.support.cuda.tensors import Devices, EmulatedTensor
from twotower_spec.drafting import AsyncSession, FixedPolicy
from vllm_twotower.config import FOUND, KNOBS
from vllm_twotower.runner import PROPOSER, V2_SETTINGS
from vllm_twotower.v2.sampler import TwoTowerRejectionSampler, TwoTowerSampler
from vllm_twotower.v2.speculator import TwoTowerSpeculator

VOCAB, NUM_DRAFTS, MAX_LEN = 61, 4, 128
NAMES = ("a", "b", "c")
# Tokens of the prompts that the first step reads: the last one in part.
FIRST = (5, 3, 12)


@contextmanager
def device_of_verifier(device: str) -> Iterator[Usage | None]:
    """Makes an emulated device available, whose kernels see pinned memory of the host as vLLM's do; "cpu" for none."""
    repairs.install()
    if device == "cpu":
        with patch.object(buffer_utils, "UvaBuffer", UvaBuffer):
            yield None
        return
    with (
        emulated_devices() as usage,
        patch.object(buffer_utils, "UvaBuffer", _SeenByDevice),
        patch.object(torch_utils, "is_pin_memory_available", lambda: True),
    ):
        yield usage


class _SeenByDevice(UvaBuffer):  # type: ignore[misc]
    """Pinned memory of the host, and a view of it on the current device."""

    def uva(self, n: int | None = None) -> Tensor:
        assert Devices.current is not None
        return EmulatedTensor(Devices.current.pin(super().uva(n)), torch.device("cuda", Devices.current.device))


class Runner:
    """The part of vLLM's runner around a model, of three requests."""

    def __init__(self, device: str, denoiser_device: str, params: list[dict[str, Any]], rule: str) -> None:
        """Begins with three prompts.

        Args:
            device: of the verifier and the context tower.
            denoiser_device: of the denoiser.
            params: of every request.
            rule: by which drafts are verified.
        """
        self.device = torch.device(device)
        settings = {**V2_SETTINGS, "model": PROPOSER, "num_speculative_tokens": NUM_DRAFTS}
        speculative = SimpleNamespace(
            **settings, rejection_sample_method="standard", enable_adaptive_verification=False
        )
        knobs = {"model": "T", "policy": "fixed", "block_size": 8, "verification": rule}
        vllm_config: Any = SimpleNamespace(
            additional_config={KNOBS: knobs, FOUND: {"block_size": 8, "num_token_ids": VOCAB}},
            speculative_config=speculative,
            model_config=SimpleNamespace(
                get_vocab_size=lambda: VOCAB, is_hybrid=False, enforce_eager=True, max_model_len=MAX_LEN, seed=0
            ),
            parallel_config=SimpleNamespace(
                pipeline_parallel_size=1, data_parallel_rank=0, tensor_parallel_size=1, use_ubatching=False
            ),
            reasoning_config=None,
        )
        self.states = RequestState(4, MAX_LEN, 64, NUM_DRAFTS, VOCAB, self.device)
        self.sampler = TwoTowerSampler(
            vllm_config=vllm_config,
            max_num_reqs=4,
            vocab_size=VOCAB,
            device=self.device,
            req_states=self.states,
            num_speculative_tokens=NUM_DRAFTS,
        )
        self.rejection_sampler = TwoTowerRejectionSampler(self.sampler, speculative, self.device)
        self.speculator = TwoTowerSpeculator(vllm_config, self.device, self.states)
        model = placed(device, denoiser_device)
        policy = FixedPolicy(8, 1, num_tokens=NUM_DRAFTS)
        self.speculator.session = AsyncSession(model, policy, most_per_step=NUM_DRAFTS + 1, num_slots=3, num_tokens=256)
        generator = torch.Generator().manual_seed(0)
        self._next = 3 * torch.randn(VOCAB, VOCAB, generator=generator)
        self._logits = self._next.to(self.device)
        self._inputs = InputBuffers(4, 64, self.device)
        self._new = [self._add(*one) for one in zip(NAMES, PROMPTS, params, strict=True)]

    def step(self, scheduled: list[int], num_drafts: list[int], usage: Usage | None = None) -> dict[str, Any]:
        """One step of the runner.

        Args:
            scheduled: tokens of every request that it reads, its drafts included.
            num_drafts: drafts that it verifies.
            usage: counts what sampler and speculator do.

        Returns:
            Tokens, drafts, log-probabilities and, where it is counted, what the host waited for.
        """
        batch = self._batch(scheduled, num_drafts)
        logits = self._logits[batch.input_ids[batch.logits_indices].long()]
        self.speculator.begin_step(self, SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=self._new))
        self._new = []
        if usage is not None:
            usage.reset()
        output = (self.rejection_sampler if any(num_drafts) else self.sampler)(logits, batch)
        waits, kernels = ({}, {}) if usage is None else (dict(usage.waits), dict(usage.kernels))
        post_update(
            batch.idx_mapping,
            self.states.num_computed_tokens.gpu,
            self.states.last_sampled_tokens,
            self.sampler.penalties_state.output_bin_counts,
            output.sampled_token_ids,
            output.num_sampled,
            output.num_rejected,
            batch.query_start_loc,
            self.states.all_token_ids.gpu,
            self.states.total_len.gpu,
        )
        if usage is not None:
            usage.reset()
        drafts = self.speculator.propose(
            batch, None, None, None, None, output.num_sampled, output.num_rejected, self.states.last_sampled_tokens
        )
        if usage is not None:
            waits |= usage.waits
        self.states.draft_tokens[batch.idx_mapping] = drafts
        for name, count in zip(NAMES, scheduled, strict=True):
            slot = self.states.req_id_to_index[name]
            prefill = int(self.states.prefill_len.np[slot])
            read = int(self.states.num_computed_prefill_tokens[slot]) + count
            self.states.num_computed_prefill_tokens[slot] = min(read, prefill)
            self.states.num_computed_tokens_np[slot] += count
        counts, tokens = output.num_sampled.tolist(), output.sampled_token_ids.tolist()
        # The first request's first draft is right in the next step.
        self.states.draft_tokens[self.states.req_id_to_index["a"], 0] = int(
            self._next[tokens[0][counts[0] - 1]].argmax()
        )
        return {
            "tokens": [row[:count] for row, count in zip(tokens, counts, strict=True)],
            "drafts": drafts.tolist(),
            "logprobs": None if output.logprobs_tensors is None else output.logprobs_tensors.logprobs.tolist(),
            "waits": waits,
            "kernels": kernels,
        }

    def failures(self) -> list[float]:
        """How often vLLM's own sampler took over, and rounds failed."""
        return [self.rejection_sampler.num_failures, self.speculator.stats.get("fallbacks", "error")]

    def _add(self, name: str, prompt: list[int], given: Mapping[str, Any]) -> SimpleNamespace:
        params = SamplingParams.from_optional(**given)
        self.states.add_request(name, len(prompt), prompt, 0, 64)
        self.sampler.add_request(self.states.req_id_to_index[name], params)
        self.states.apply_staged_writes()
        self.sampler.apply_staged_writes()
        return SimpleNamespace(req_id=name, prefill_token_ids=prompt)

    def _batch(self, scheduled: list[int], num_drafts: list[int]) -> InputBatch:
        """Inputs of a step, as vLLM makes them."""
        slots = np.array([self.states.req_id_to_index[name] for name in NAMES], dtype=np.intp)
        read, prefill = self.states.num_computed_prefill_tokens[slots], self.states.prefill_len.np[slots]
        state = BatchReqState(
            req_ids=list(NAMES),
            num_scheduled_tokens=np.array(scheduled, dtype=np.int32),
            num_tokens=sum(scheduled),
            num_draft_tokens_np=np.array(num_drafts, dtype=np.int32),
            idx_mapping_np=slots,
            prefill_len_np=prefill,
            num_computed_prefill_tokens_np=read.copy(),
            is_prefilling_np=read < prefill,
            max_seq_len_np=None,
            has_prefill=bool((read < prefill).any()),
            prefill_runs_as_decode_np=None,
            decode_graph_eligible=False,
        )
        runner: Any = SimpleNamespace(
            device=self.device,
            input_buffers=self._inputs,
            model_state=SimpleNamespace(num_new_sampled_tokens_per_step=1),
            adaptive_verification=None,
            max_num_reqs=4,
            decode_query_len=NUM_DRAFTS + 1,
            req_states=self.states,
            fast_prefill=None,
            pcp_manager=None,
            model_config=SimpleNamespace(rswa_window=None),
        )
        scheduler_output: Any = SimpleNamespace(
            scheduled_spec_decode_tokens={
                name: [-1] * count for name, count in zip(NAMES, num_drafts, strict=True) if count
            },
            has_structured_output_requests=False,
        )
        descriptor: Any = SimpleNamespace(num_tokens=0, num_reqs=None)
        return GPUModelRunner.prepare_inputs(runner, scheduler_output, state, descriptor, 0)


def steps(device: str, denoiser_device: str, params: list[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
    """Runs steps from prompts to steady ones, and gives what each did; for the arguments see `Runner`."""
    with device_of_verifier(device) as usage:
        runner = Runner(device, denoiser_device, params, rule)
        found = [runner.step(list(FIRST), [0, 0, 0], usage), runner.step([5, 5, 8], [4, 4, 0], usage)]
        found += [runner.step([5, 5, 5], [4, 4, 4], usage) for _ in range(2)]
        assert runner.failures() == [0, 0]
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps([steps(**given) for given in json.loads(sys.argv[1])]))
