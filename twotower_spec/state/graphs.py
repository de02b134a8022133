"""CUDA graphs of passes of fixed shape: the host starts one with one launch instead of hundreds."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

# Most tokens of a captured pass: longer ones take a device longer than the host, and their logits much room.
MOST_CAPTURED_TOKENS = 256

logger = logging.getLogger(__name__)


class PassGraphs:
    """Passes by their shape, captured before they are needed, in one pool of memory.

    A pass reads its inputs from buffers that stay where they are, and writes its result to another one. What was not
    captured is run as it is: on a CPU everything, and on CUDA all passes once one of them could not be captured.

    Attributes:
        device: of the passes.
    """

    def __init__(self, device: torch.device, wanted: bool = True) -> None:
        """Begins without any; there never are any on a CPU, or where they are not wanted."""
        self.device, self._nbytes = device, 0
        self._works = wanted and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._logits: dict[torch.dtype, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the graphs and their logits hold."""
        return self._nbytes + sum(room.nbytes for room in self._logits.values())

    def logits_room(self, num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """Room for logits [num_rows, vocab_size], which all passes share: one is read before the next one runs.

        Ask for the largest first; what was captured goes on writing to the room of then.
        """
        room = self._logits.get(dtype)
        if room is None or len(room) < num_rows:
            room = self._logits[dtype] = torch.empty(num_rows, vocab_size, dtype=dtype, device=self.device)
        return room[:num_rows]

    @property
    def available(self) -> bool:
        """Whether passes can be captured."""
        return self._works

    def __contains__(self, key: Hashable) -> bool:
        """Whether `replay` runs the pass of this shape."""
        return key in self._graphs

    def capture(self, key: Hashable, run: Callable[[], None]) -> None:
        """Captures a pass, once: the host reads nothing in it, and gives the device nothing new."""
        if not self._works or key in self._graphs:
            return
        before = torch.cuda.memory_reserved(self.device)
        try:
            self._graphs[key] = self._captured(run)
        except Exception as fault:
            self._works = False
            self._graphs.clear()
            gc.collect()
            logger.warning(
                "tower passes on %s run without CUDA graphs: %s cannot be captured: %r", self.device, key, fault
            )
        self._nbytes += max(0, torch.cuda.memory_reserved(self.device) - before)

    def replay(self, key: Hashable) -> None:
        """Runs a captured pass on what is in its buffers now."""
        with torch.cuda.device(self.device):
            self._graphs[key].replay()

    def _captured(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self.device):
            current, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                run()  # makes what is made once
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads of an engine may go on with other work meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
        if self._pool is None:
            self._pool = graph.pool()
        return graph


def padded_count(count: int) -> int:
    """Requests of the graph that serves `count` of them: a power of two."""
    return 1 << (count - 1).bit_length()


def padded_counts(most: int) -> Iterator[int]:
    """All that `padded_count` gives up to `most`, the largest first: what comes later fits into its memory."""
    for exponent in reversed(range(most.bit_length())):
        yield 1 << exponent


def fill_rows(buffer: Tensor, values: Tensor, count: int, rest: int | None = None) -> None:
    """Puts values [num_reqs, ...] into the first rows of a buffer, a further dimension of which may be longer.

    Rows from there up to `count` get `rest`, or the first of the values.
    """
    num_reqs = len(values)
    rows = buffer[:count] if values.dim() == 1 else buffer[:count, : values.shape[1]]
    rows[:num_reqs] = values
    if num_reqs < count:
        rows[num_reqs:] = values[:1] if rest is None else rest
