"""V1's rejection sampler on an emulated device: tokens are those of a CPU, and the host waits for nothing."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.cuda import Usage, emulated_devices
from tests.vllm_plugin.fork_server import TESTED_VERSION

if not find_spec("vllm") or TESTED_VERSION in os.environ:  # others make batches otherwise
    pytest.skip("needs the environment's vLLM", allow_module_level=True)

from vllm import SamplingParams
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_twotower.v1.sampler import TwoTowerRejectionSampler

VOCAB = 61
NUM_DRAFTS = np.array([4, 0, 2])

GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 3}
# Parameters of three requests, by what they ask for.
KINDS: dict[str, list[dict[str, Any]]] = {
    "greedy": [GREEDY] * 3,
    "sampled": [SAMPLED, {"temperature": 1.2, "seed": 5}, {"temperature": 0.5}],
    "greedy beside sampled": [GREEDY, SAMPLED, SAMPLED],
    "top-p, top-k": [{**SAMPLED, "top_p": 0.7}, {**SAMPLED, "top_k": 3}, SAMPLED],
    "top-p, min-p": [{**SAMPLED, "top_p": 0.7}, {**SAMPLED, "min_p": 0.3}, GREEDY],
    "logit_bias": [{**GREEDY, "logit_bias": {5: 9.0, 7: -4.0}}, {**SAMPLED, "logit_bias": {9: 3.0}}, GREEDY],
    "allowed_token_ids": [{**GREEDY, "allowed_token_ids": [3, 8]}, {**SAMPLED, "allowed_token_ids": [9]}, GREEDY],
    "logprobs": [{**GREEDY, "logprobs": 2}, SAMPLED, GREEDY],
    "logprob_token_ids": [{**GREEDY, "logprob_token_ids": [3, 8]}, {**SAMPLED, "logprobs": 1}, GREEDY],
}


class Steps:
    """Steps of three requests in vLLM's own batch, whose drafts a sampler verifies on a device."""

    def __init__(self, kind: str, device: str, rule: Any = "one-hot", logprobs_mode: Any = "raw_logprobs") -> None:
        self.device = torch.device(device)
        self._batch = InputBatch(3, 128, 64, self.device, VOCAB, [16], [8], num_spec_tokens=4)
        requests = {}
        for row, given in enumerate(KINDS[kind]):
            state = CachedRequestState(
                f"request {row}", [5 + row] * 9, [], SamplingParams(**given), None, ([row],), 9, [7, 8 + row]
            )
            requests[state.req_id] = state
            self._batch.add_request(state)
        self._batch.refresh_metadata()
        sampler = Sampler(logprobs_mode)
        sampler.pin_memory = self.device.type == "cuda"  # as vLLM has it
        self._sampler = TwoTowerRejectionSampler(sampler)
        config = SimpleNamespace(model_config=SimpleNamespace(seed=0))
        self._sampler.attach(SimpleNamespace(input_batch=self._batch, requests=requests, vllm_config=config), rule)

    def inputs(self, number: int) -> tuple[SpecDecodeMetadata, Tensor]:
        """Drafts of a step, of which the first is the likely one, and logits."""
        generator = torch.Generator().manual_seed(number)
        last = np.cumsum(NUM_DRAFTS + 1) - 1
        logits = 3 * torch.randn(int(last[-1]) + 1, VOCAB, generator=generator)
        drafts = torch.randint(VOCAB, (3, 4), generator=generator)
        drafts[:, 0] = logits[last - NUM_DRAFTS].argmax(dim=1)
        rows = [row[:count] for row, count in zip(drafts.tolist(), NUM_DRAFTS.tolist(), strict=True)]
        metadata = SpecDecodeMetadata.make_dummy(rows, self.device)
        metadata.bonus_logits_indices = torch.from_numpy(last).to(self.device)
        metadata.target_logits_indices = torch.from_numpy(np.delete(np.arange(len(logits)), last)).to(self.device)
        return metadata, logits.to(self.device)

    def verify(self, metadata: SpecDecodeMetadata, logits: Tensor) -> Any:
        """Runs the sampler, of whose results nothing is read yet."""
        self._batch.num_tokens_no_spec[:3] += 1
        found = self._sampler(metadata, None, logits, self._batch.sampling_metadata)
        assert self._sampler.num_failures == 0
        return found

    def run(self, num_steps: int = 2) -> list[Any]:
        """Tokens and log-probabilities of steps; both are computed by the same operators on both devices."""
        found = []
        for number in range(num_steps):
            output = self.verify(*self.inputs(number))
            found.append(output.sampled_token_ids.tolist())
            found += [one.tolist() for one in (output.logprobs_tensors or ())[:3]]
        return found


def counted(usage: Usage, steps: Steps, number: int) -> Usage:
    """Counts what a step asks of a device until vLLM reads its tokens."""
    metadata, logits = steps.inputs(number)
    usage.reset()
    steps.verify(metadata, logits)
    return usage


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rule"), [*((kind, "one-hot") for kind in KINDS), ("top-p, min-p", "coupled")])
def test_tokens_are_those_of_a_cpu(kind: str, rule: str) -> None:
    expected = Steps(kind, "cpu", rule).run()
    with emulated_devices():
        assert Steps(kind, "cuda:0", rule).run() == expected


@pytest.mark.slow
def test_processed_log_probabilities_are_those_of_a_cpu() -> None:
    expected = Steps("logprobs", "cpu", logprobs_mode="processed_logprobs").run()
    with emulated_devices():
        assert Steps("logprobs", "cuda:0", logprobs_mode="processed_logprobs").run() == expected


def test_a_verifier_on_another_device_than_the_current_one_is_served_there() -> None:
    expected = Steps("sampled", "cpu").run(1)
    with emulated_devices() as usage:
        assert Steps("sampled", "cuda:1").run(1) == expected
        assert not usage.crossings and not usage.held[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(kind: str) -> None:
    allowed = 1 if kind == "allowed_token_ids" else 0  # vLLM's own, which lays out its mask by drafts
    with emulated_devices(runs_kernels=False) as usage:
        steps = Steps(kind, "cuda:0")
        for number in range(2):  # the first of a batch brings parameters to the device
            assert counted(usage, steps, number).waits.total() <= allowed, number


def test_processed_log_probabilities_are_not_waited_for_either() -> None:
    with emulated_devices(runs_kernels=False) as usage:
        assert not counted(usage, Steps("logprobs", "cuda:0", logprobs_mode="processed_logprobs"), 0).waits


@pytest.mark.parametrize("kind", ["greedy", "sampled", "top-p, min-p"])
def test_a_steady_step_is_two_kernels_and_a_copy_of_lengths(kind: str) -> None:
    with emulated_devices(runs_kernels=False) as usage:
        steps = Steps(kind, "cuda:0")
        counted(usage, steps, 0)
        found = counted(usage, steps, 1)
    assert found.kernels.total() == 2 and found.launches == {"_to_copy": 1}, found
