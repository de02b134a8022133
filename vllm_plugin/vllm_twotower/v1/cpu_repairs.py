"""Repairs of stock vLLM on a CPU, without which speculative decoding there is neither lossless nor safe.

The faults are in vLLM 0.27 to 0.33 (the second from 0.32 on). The first two touch every speculative method, not
ours alone; the third every engine. Each repair goes when vLLM's own function passes its test in
tests/vllm_plugin/v1/test_cpu_repairs.py.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler
from vllm.v1.worker import gpu_model_runner

from vllm_twotower.compat import wrap_once


def install() -> None:
    """Replaces two functions of vLLM's rejection sampler and one of its model runner, once."""
    wrap_once(rejection_sampler, "expand_batch_to_tokens", _expanding)
    wrap_once(rejection_sampler, "apply_sampling_constraints", _not_on_nothing)
    wrap_once(gpu_model_runner.GPUModelRunner, "sample_tokens", _not_drawing_while_prompts_are_read)


def _expanding(stock: Any) -> Any:
    """vLLM's CPU kernel writes to a copy of its output: temperature and filters stay uninitialised memory."""

    def expand_batch_to_tokens(
        x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Tensor:
        if x.device.type != "cpu":
            expanded: Tensor = stock(x, cu_num_tokens, num_tokens, replace_from, replace_to)
            return expanded
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
        replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return torch.repeat_interleave(replaced, counts)

    return expand_batch_to_tokens


def _not_on_nothing(stock: Any) -> Any:
    """With top_k, a step without any draft takes the maximum of an empty tensor, which ends the engine."""

    def apply_sampling_constraints(logits: Tensor, cu_num_draft_tokens: Tensor, sampling_metadata: Any) -> Tensor:
        if logits.shape[0] == 0:
            return logits
        constrained: Tensor = stock(logits, cu_num_draft_tokens, sampling_metadata)
        return constrained

    return apply_sampling_constraints


def _not_drawing_while_prompts_are_read(stock: Any) -> Any:
    """A token sampled before its prompt is read whole is thrown away, and vLLM takes the draw back by an offset.

    Generators on a CPU have no offset: with a seed and a prompt that is read in pieces the engine ends. Here such a
    request's generator stays out of the step. It draws nothing, so that nothing has to be taken back.
    """

    @wraps(stock)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        generators = self.input_batch.generators
        thrown_away = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        withheld = {row: generators.pop(row) for row in thrown_away if row in generators}
        try:
            return stock(self, grammar_output)
        finally:
            generators.update(withheld)

    return sample_tokens
