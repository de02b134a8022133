"""How many drafts a request can still use, and which requests are gone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from vllm_twotower.sampling_parameters import allows_drafts


def usable_drafts(runner: Any, request_id: str, num_tokens: int, most: int) -> int:
    """How many drafts a request can still use before max_model_len or its own max_tokens ends it; 0 for some rules.

    Before min_tokens are reached, drafts end there too: in the row after the last draft vLLM forbids stop tokens by the
    length that the request had before the step, also where that row is beyond min_tokens.
    """
    room = int(runner.max_model_len) - num_tokens - 1
    request = runner.requests.get(request_id)
    params = getattr(request, "sampling_params", None)
    if request is not None and params is not None:
        if not allows_drafts(params):
            return 0
        written = len(request.output_token_ids)
        if params.max_tokens is not None:
            room = min(room, params.max_tokens - written - 1)
        if written < params.min_tokens:
            room = min(room, params.min_tokens - written - 1)
    return max(0, min(most, room))


def gone(held: Iterable[Hashable], runner: Any) -> list[Hashable]:
    """Requests that vLLM has forgotten; a preempted one is out of the batch, and still known."""
    return [request_id for request_id in held if request_id not in runner.requests]
