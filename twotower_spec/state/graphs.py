"""CUDA graphs of passes of fixed shape: the host starts one with one launch instead of hundreds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from twotower_kernels.backend import use_triton
from twotower_spec.towers.backbone import Backbone

# Most tokens of a captured pass: longer ones take a device longer than the host, and their logits much room.
MOST_CAPTURED_TOKENS = 256

logger = logging.getLogger(__name__)


class PassGraphs:
    """Passes by their shape, captured before they are needed, in one pool of memory.

    A pass reads its inputs from buffers that stay where they are, and writes its result to another one. What is not
    here is run as it is by whoever asks: on a CPU everything, and on CUDA what could not be captured.

    Attributes:
        device: of the passes.
    """

    def __init__(self, device: torch.device, wanted: bool = True) -> None:
        """Begins without any; there never are any on a CPU, or where they are not wanted."""
        self.device, self._nbytes = device, 0
        self._captures = wanted and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        # One stream for all: cuBLAS keeps a workspace for each that it has seen.
        self._stream: torch.cuda.Stream | None = None
        self._logits: list[Tensor] = []

    @classmethod
    def of_tower(cls, tower: Backbone, wanted: bool = True) -> PassGraphs:
        """Begins, for a tower whose passes run by kernels: PyTorch's way through experts looks at them."""
        by_kernels = use_triton(tower.embeddings) and tower.dtype != torch.float64
        return cls(tower.device, wanted and by_kernels)

    @property
    def nbytes(self) -> int:
        """Bytes that graphs and their buffers hold."""
        return self._nbytes + sum(room.nbytes for room in self._logits)

    @property
    def available(self) -> bool:
        """Whether further passes are captured."""
        return self._captures

    def __contains__(self, key: Hashable) -> bool:
        """Whether `replay` runs the pass of this shape."""
        return key in self._graphs

    def buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Makes an input of passes, zeros."""
        made = torch.zeros(shape, dtype=dtype, device=self.device)
        self._nbytes += made.nbytes
        return made

    def logits_room(self, num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """Room for logits [num_rows, vocab_size], which all passes share: one is read before the next one runs."""
        for room in self._logits:
            if room.dtype == dtype and len(room) >= num_rows:
                return room[:num_rows]
        self._logits.append(torch.empty(num_rows, vocab_size, dtype=dtype, device=self.device))
        return self._logits[-1]

    def capture(self, key: Hashable, run: Callable[[], None]) -> None:
        """Captures a pass, once: the host reads nothing in it, and gives the device nothing new.

        Where that fails it is logged, and nothing more is captured; graphs that are there stay.
        """
        if not self._captures or key in self._graphs:
            return
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()  # what others have left is no memory of the graph
            before, current = torch.cuda.memory_reserved(self.device), torch.cuda.current_stream(self.device)
            aside = self._stream = self._stream or torch.cuda.Stream(self.device)
            aside.wait_stream(current)
            with torch.cuda.stream(aside):  # so that a capture that breaks off leaves the stream of before
                run()  # makes what is made once
                try:
                    self._graphs[key] = self._captured(run, aside)
                except Exception as fault:
                    self._captures = False
                    logger.warning(
                        "passes %s on %s, and all that follow, run without CUDA graphs: %r", key, self.device, fault
                    )
            current.wait_stream(aside)
            self._nbytes += max(0, torch.cuda.memory_reserved(self.device) - before)

    def replay(self, key: Hashable) -> None:
        """Runs a captured pass on what is in its buffers now.

        Raises:
            KeyError: it was not captured.
        """
        with torch.cuda.device(self.device):
            self._graphs[key].replay()

    def _captured(self, run: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads of an engine may go on with other work meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
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
