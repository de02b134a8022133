"""Which request every row of a step belongs to, how much it can still use, and which requests are gone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.int32]


class RowsByContent:
    """Finds the request of every row by what it begins with: for a vLLM that does not say which it is.

    Of two rows with one history either may be taken for the other, which costs drafts and nothing else.
    """

    def __init__(self) -> None:
        self._histories: dict[int, Row] = {}
        self._next_id = 0

    def identify(self, rows: Sequence[Row]) -> list[int]:
        """An id per row, the one of last time where a row continues it."""
        free = dict(self._histories)
        ids = []
        for row in rows:
            match = next((known for known, history in free.items() if _continues(row, history)), None)
            if match is None:
                match, self._next_id = self._next_id, self._next_id + 1
            free.pop(match, None)
            ids.append(match)
        self._histories = {request: row.copy() for request, row in zip(ids, rows, strict=True)}
        return ids


def _continues(row: Row, history: Row) -> bool:
    return len(row) >= len(history) and bool(np.array_equal(row[: len(history)], history))


def usable_drafts(runner: Any, request_id: str, num_tokens: int, most: int) -> int:
    """How many drafts a request can still use before max_model_len or its own max_tokens ends it.

    Before min_tokens are reached, drafts end there too: in the row after the last draft vLLM forbids stop tokens by the
    length that the request had before the step, also where that row is beyond min_tokens.
    """
    room = int(runner.max_model_len) - num_tokens - 1
    request = runner.requests.get(request_id)
    params = getattr(request, "sampling_params", None)
    if request is not None and params is not None:
        written = len(request.output_token_ids)
        if params.max_tokens is not None:
            room = min(room, params.max_tokens - written - 1)
        if written < params.min_tokens:
            room = min(room, params.min_tokens - written - 1)
    return max(0, min(most, room))


def gone(held: Iterable[Hashable], runner: Any) -> list[Hashable]:
    """Requests that vLLM has forgotten; a preempted one is out of the batch, and still known."""
    return [request_id for request_id in held if request_id not in runner.requests]
