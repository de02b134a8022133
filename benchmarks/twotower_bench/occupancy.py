"""How full the batch of an engine was, from what became of its requests."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from twotower_bench.records import ServedRequest


@dataclass(frozen=True)
class Occupancy:
    """How full the batch was while requests followed each other: as one ended the next began.

    Attributes:
        num_steps: of the engine.
        mean_batch_size: requests per step; less than the concurrency since the last ones end one after the other.
        first_steps: of each request, the step that read its prompt, counted from 0.
    """

    num_steps: int
    mean_batch_size: float
    first_steps: tuple[int, ...]

    @property
    def num_prompt_steps(self) -> int:
        """Steps that read at least one prompt."""
        return len(set(self.first_steps))


def occupancy(requests: Sequence[ServedRequest], concurrency: int) -> Occupancy:
    """From the numbers of steps of all requests, which is all it takes.

    Args:
        requests: in the order of submission; at least one.
        concurrency: most at once.
    """
    free = [0] * concurrency
    first_steps = []
    lengths = [1 + len(one.num_accepted_tokens) for one in requests]
    for length in lengths:
        start = heapq.heappop(free)
        first_steps.append(start)
        heapq.heappush(free, start + length)
    return Occupancy(max(free), sum(lengths) / max(free), tuple(first_steps))
