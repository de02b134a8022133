"""Repairs of vLLM's model runner V1 for verifiers with Mamba layers, with any speculative method and on every device.

In a step with drafts such a layer keeps one state per token. How many tokens were accepted is only known after the
step, so the runner remembers the count of every row, and the next step starts from the state that the count points at.
vLLM loses sight of it on three paths (docs/vllm.md describes them for its developers):

* A step that leaves a running request out, for want of token budget, drops its row; when the request comes back, its
  count is 1, and it goes on from a state that is older than its text.
* After a preemption a request reads its own output again. A piece of two tokens up to one more than the drafts of a
  step is taken for drafts that were verified, of which one was accepted, though all of its tokens are known.
* The last token of a prompt, whose beginning was cached, is padded with drafts that mean nothing. Behind a piece of
  another prompt no longer than drafts it is read as a prompt, padding and all.

Each repair goes when vLLM passes its test in tests/vllm_plugin/v1/test_hybrid_repairs.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from functools import wraps
from typing import Any

from vllm.v1.worker import gpu_model_runner

from vllm_twotower.compat import wrap_once

# Names under which a runner holds accepted counts of requests that a step leaves out, and `other_prompt_lengths`.
_COUNTS, _PROMPTS = "_twotower_accepted_counts", "_twotower_prompt_lengths"


def install() -> None:
    """Wraps four functions of the runner, once."""
    runner_class = gpu_model_runner.GPUModelRunner
    wrap_once(runner_class, "_update_states", keeping_accepted_counts)
    wrap_once(runner_class, "_may_reorder_batch", ordering_by_what_rows_do)
    wrap_once(runner_class, "_build_attention_metadata", describing_what_rows_do)
    wrap_once(runner_class, "_determine_batch_execution_and_padding", running_prefill_as_such)


def keeping_accepted_counts(stock: Any) -> Any:
    """A request that a step leaves out takes its accepted count along, and has it again when it comes back."""

    @wraps(stock)
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        # With asynchronous scheduling the counts live on the device, and the runner reads other ones.
        if not self.model_config.is_hybrid or not self.num_spec_tokens or self.use_async_scheduling:
            return stock(self, scheduler_output)
        batch, counts = self.input_batch, vars(self).setdefault(_COUNTS, {})
        ended = {*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())}
        for request_id in ended | scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            counts.pop(request_id, None)  # its state is gone, or begins anew
        left_out = _left_out(batch.req_ids, scheduler_output.num_scheduled_tokens.keys() | ended)
        if left_out:
            self.num_accepted_tokens_event.synchronize()  # the runner waits for it too, a little later in this step
            counts |= {one: int(batch.num_accepted_tokens_cpu[batch.req_id_to_index[one]]) for one in left_out}
        corrections = stock(self, scheduler_output)
        for request_id in counts.keys() & batch.req_id_to_index.keys():
            batch.num_accepted_tokens_cpu[batch.req_id_to_index[request_id]] = counts.pop(request_id)
        return corrections

    return _update_states


def _left_out(request_ids: list[str], others: Set[str]) -> list[str]:
    """Requests of the batch that go on later: not among those that are in this step, or ended or preempted."""
    return [one for one in request_ids if one not in others]


def ordering_by_what_rows_do(stock: Any) -> Any:
    """Requests that read their own output again stand among the prefills, padded prompts among the decodes."""

    @wraps(stock)
    def _may_reorder_batch(self: Any, scheduler_output: Any) -> None:
        concerns_us = self.model_config.is_hybrid and self.num_spec_tokens
        setattr(self, _PROMPTS, other_prompt_lengths(self, scheduler_output) if concerns_us else {})
        with counted_prompts(self):
            stock(self, scheduler_output)

    return _may_reorder_batch


def describing_what_rows_do(stock: Any) -> Any:
    """Mamba layers read what is read again as a prompt, which leaves one state, that of its last token."""

    @wraps(stock)
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        with counted_prompts(self):
            return stock(self, *args, **kwargs)

    return _build_attention_metadata


def running_prefill_as_such(stock: Any) -> Any:
    """A batch runs no CUDA graph of uniform decoding, chosen by lengths alone, while a piece in it is read again."""

    @wraps(stock)
    def _determine_batch_execution_and_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths = getattr(self, _PROMPTS, {})
        rereads = any(length > self.requests[one].num_computed_tokens for one, length in lengths.items())
        if rereads and kwargs.get("force_uniform_decode") is None:
            kwargs["force_uniform_decode"] = False
        return stock(self, *args, **kwargs)

    return _determine_batch_execution_and_padding


def other_prompt_lengths(runner: Any, scheduler_output: Any) -> dict[str, int]:
    """Lengths of prompts by which the runner, which compares them with what is computed, tells prefills from decodes.

    Args:
        runner: vLLM's.
        scheduler_output: vLLM's, of the step.

    Returns:
        Lengths by request, of those for which it is not that of the prompt.
    """
    found = {}
    for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
        request = runner.requests[request_id]
        num_known = num_tokens - len(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
        if request.num_prompt_tokens <= request.num_computed_tokens:
            if num_known > 1:
                found[request_id] = request.num_tokens
        elif num_known == 1 < num_tokens:
            found[request_id] = request.num_computed_tokens
    return found


@contextmanager
def counted_prompts(runner: Any) -> Iterator[None]:
    """Has the runner count prompts by `other_prompt_lengths` of this step."""
    batch, lengths = runner.input_batch, getattr(runner, _PROMPTS, {})
    rows = batch.req_id_to_index
    lengths = {request_id: length for request_id, length in lengths.items() if request_id in rows}
    for request_id, length in lengths.items():
        batch.num_prompt_tokens[rows[request_id]] = length
    try:
        yield
    finally:
        for request_id in lengths:  # rows may have changed places
            batch.num_prompt_tokens[rows[request_id]] = runner.requests[request_id].num_prompt_tokens
