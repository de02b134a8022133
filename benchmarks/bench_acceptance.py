"""Verification of a batch of drafts, beside vLLM's own V1 sampler, FlashInfer, and PyTorch as people write it."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import OURS, Case, Systems, one_by_one, side_by_side
from benchmarks.shapes import REAL_SIZE
from twotower_kernels.acceptance import AcceptanceRule, Accepted, SamplingTensors, accept

NUM_DRAFTS = 16
MODES = ("greedy", "coupled", "one-hot", "one-hot, top-p 0.95")


def cases(device: torch.device) -> list[Case]:
    """Batches whose requests bring 16 drafts each, most of them likely under the target."""
    if device.type == "cuda":
        sizes = [(num_reqs, REAL_SIZE.vocab_size, torch.bfloat16) for num_reqs in (8, 32, 64)]
    else:
        sizes = [(1, 2048, torch.float32), (8, 2048, torch.float32), (2, 32768, torch.bfloat16)]
    return [_case(device, mode, *size) for mode in MODES for size in sizes]


def _case(device: torch.device, mode: str, num_reqs: int, vocab_size: int, dtype: torch.dtype) -> Case:
    rows = num_reqs * (NUM_DRAFTS + 1)

    def make() -> Systems:
        batch = Batch(device, mode, num_reqs, vocab_size, dtype)
        systems: Systems = {OURS: batch.ours, "torch composition": batch.composition}
        if find_spec("vllm"):
            systems["vLLM V1 sampler"] = batch.stock_vllm()
        if device.type == "cuda" and find_spec("flashinfer"):
            systems["FlashInfer chain sampling"] = batch.flashinfer
        batch.check()
        return systems

    return Case(
        op="acceptance",
        kernel="judge_one_hot" if mode.startswith("one-hot") else "judge_rows",
        shape=f"{mode}, {num_reqs} x {NUM_DRAFTS + 1} x {vocab_size} {str(dtype).removeprefix('torch.')}",
        bytes_moved=rows * vocab_size * dtype.itemsize,
        make=make,
    )


class Batch:
    """Logits of a target, drafts, and the ways to verify them."""

    def __init__(self, device: torch.device, mode: str, num_reqs: int, vocab_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.device, self.num_reqs, self.greedy = device, num_reqs, mode == "greedy"
        self.rule: AcceptanceRule = "coupled" if mode == "coupled" else "one-hot"
        width = NUM_DRAFTS + 1
        self.logits = torch.empty(num_reqs * width, vocab_size, dtype=dtype, device=device)
        for row in self.logits:  # row by row: a float32 copy of all would not fit beside the rivals' own
            row.copy_(2.5 * torch.randn(vocab_size, generator=generator, device=device))
        best = self.logits.view(num_reqs, width, -1)[:, :-1].argmax(-1)
        # Half of the drafts far from the target's choice: prefixes of every length are accepted.
        other = torch.randint(0, vocab_size, best.shape, generator=generator, device=device)
        keep = torch.rand(best.shape, generator=generator, device=device) < 0.9
        self.drafts = torch.where(keep, best, other).int()
        self.logits.view(num_reqs, width, -1)[:, :-1].scatter_add_(
            2, self.drafts[..., None].long(), torch.full_like(self.drafts, 12, dtype=dtype)[..., None]
        )
        self.cumulative = torch.arange(1, num_reqs + 1, dtype=torch.int32, device=device) * NUM_DRAFTS
        top_p = torch.full((num_reqs,), 0.95, device=device) if "top-p" in mode else None
        temperature = None if self.greedy else torch.full((num_reqs,), 0.8, device=device)
        seeds = torch.arange(num_reqs, device=device)
        self.sampling = SamplingTensors(temperature, None, top_p, None, seeds, 100 * seeds)
        self.generator = torch.Generator(device).manual_seed(1)

    def ours(self) -> Accepted:
        return accept(self.logits, self.drafts.flatten(), self.cumulative, NUM_DRAFTS, self.sampling, self.rule)

    def composition(self) -> Tensor:
        """Verifies as one would without kernels, with noise from torch's generator instead of a counter."""
        logits = self.logits.view(self.num_reqs, NUM_DRAFTS + 1, -1)
        if self.greedy:
            picks = logits.argmax(-1)
            accepted = picks[:, :-1] == self.drafts
        else:
            probs = self._probs()
            if self.rule == "coupled":
                picks = (probs / torch.empty_like(probs).exponential_(generator=self.generator)).argmax(-1)
                accepted = picks[:, :-1] == self.drafts
            else:
                chosen = self.drafts[..., None].long()
                chance = torch.rand(self.drafts.shape, generator=self.generator, device=self.device)
                accepted = chance < probs[:, :-1].gather(2, chosen)[..., 0]
                probs[:, :-1].scatter_(2, chosen, 0.0)
                picks = (probs / torch.empty_like(probs).exponential_(generator=self.generator)).argmax(-1)
        count = accepted.long().cumprod(1).sum(1, keepdim=True)
        offset = torch.arange(NUM_DRAFTS + 1, device=self.device)
        padded = torch.nn.functional.pad(self.drafts.long(), (0, 1), value=-1)
        return torch.where(offset < count, padded, torch.where(offset == count, picks, -1)).int()

    def stock_vllm(self) -> Any:
        """Verifies with vLLM's V1 rejection sampler, for drafts without probabilities."""
        from vllm.platforms import current_platform

        if self.device.type == "cpu":  # as a CPU worker does, before the module with the kernels is imported
            current_platform.import_kernels()
            current_platform.register_triton_kernel_overrides()
        from vllm.v1.sample.logits_processor import LogitsProcessors
        from vllm.v1.sample.metadata import SamplingMetadata
        from vllm.v1.sample.rejection_sampler import RejectionSampler
        from vllm.v1.sample.sampler import Sampler
        from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

        metadata = SpecDecodeMetadata.make_dummy(self.drafts.tolist(), self.device)
        ends = torch.arange(1, self.num_reqs + 1, device=self.device) * (NUM_DRAFTS + 1)
        metadata.bonus_logits_indices = (ends - 1).int()
        every = torch.arange(len(self.logits), device=self.device)
        metadata.target_logits_indices = every[every % (NUM_DRAFTS + 1) != NUM_DRAFTS].int()
        nothing = torch.empty(0, device=self.device)
        values = {
            "temperature": self.sampling.temperature,
            "all_greedy": self.greedy,
            "all_random": not self.greedy,
            "top_p": self.sampling.top_p,
            "top_k": None,
            "generators": {},
            "max_num_logprobs": None,
            "no_penalties": True,
            "prompt_token_ids": None,
            "frequency_penalties": nothing,
            "presence_penalties": nothing,
            "repetition_penalties": nothing,
            "output_token_ids": [[] for _ in range(self.num_reqs)],
            "allowed_token_ids_mask": None,
            "bad_words_token_ids": {},
            "logitsprocs": LogitsProcessors(),
            "spec_token_ids": self.drafts.tolist(),
        }
        known = {field.name for field in fields(SamplingMetadata)}
        sampling = SamplingMetadata(**{name: value for name, value in values.items() if name in known})
        sampler = RejectionSampler(Sampler())
        return lambda: sampler(metadata, None, self.logits, sampling).sampled_token_ids

    def flashinfer(self) -> Any:
        """Verifies with FlashInfer's chain speculative sampling, which takes probabilities, of the drafts too."""
        from flashinfer.sampling import chain_speculative_sampling

        if not hasattr(self, "_one_hot"):
            shape = (self.num_reqs, NUM_DRAFTS, self.logits.shape[1])
            self._one_hot = torch.zeros(shape, device=self.device).scatter_(2, self.drafts[..., None].long(), 1.0)
        return chain_speculative_sampling(self._one_hot, self.drafts, self._probs())[0]

    def check(self) -> None:
        """Checks that greedy results agree with each other, and sampled ones with the vectorised path on a CPU."""
        done = self.ours()
        if self.greedy:
            assert done.token_ids.equal(self.composition())
            return
        first = slice(0, 2)
        few = self.sampling.of(first)
        there = SamplingTensors(*(value if value is None else value.cpu() for value in vars(few).values()))
        rows = 2 * (NUM_DRAFTS + 1) if self.num_reqs > 1 else NUM_DRAFTS + 1
        expected = accept(
            self.logits[:rows].cpu(),
            self.drafts[first].flatten().cpu(),
            self.cumulative[first].cpu(),
            NUM_DRAFTS,
            there,
            self.rule,
        )
        assert done.token_ids[first].cpu().equal(expected.token_ids)
        assert done.num_accepted.float().mean() > 1

    def _probs(self) -> Tensor:
        assert self.sampling.temperature is not None
        scaled = self.logits.float().view(self.num_reqs, NUM_DRAFTS + 1, -1) / self.sampling.temperature[:, None, None]
        probs = torch.softmax(scaled, -1)
        if self.sampling.top_p is not None:
            ordered, order = probs.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.sampling.top_p[:, None, None]
            probs = probs.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
            probs /= probs.sum(-1, keepdim=True)
        return probs


@one_by_one(cases(torch.device("cpu")))
def test_acceptance(benchmark: BenchmarkFixture, case: Case) -> None:
    side_by_side(benchmark, case)
