"""Observers of denoising steps: traces, a caller's callback, and the distributions of the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from twotower_spec.generation.denoising.picking import TokenPicker
from twotower_spec.generation.result import BlockTrace


@dataclass(frozen=True)
class ObservedStep:
    """One denoising step: what it read and what it committed.

    Attributes:
        index: counts from 0.
        rows: rows of the call that are still in the loop.
        num_masked: masked positions per row before the step, which the time conditioning saw.
        num_open: masked positions per row that the step could commit; 0 where the row was done before.
        before: int64 [num_active, block_size], the blocks that the step read.
        token_ids: int64 [num_active, block_size], the blocks afterwards.
        commits: bool [num_active, block_size].
        confidence: float [num_active, block_size], of the tokens committed so far.
        positions: int64 [num_positions], flat indices of the open positions.
        logits: [num_positions, vocab]. An observer may overwrite them.
        all_logits: [num_active * block_size, vocab], the mask token not excluded; None unless an observer wants them.
    """

    index: int
    rows: Sequence[int]
    num_masked: list[int]
    num_open: list[int]
    before: Tensor
    token_ids: Tensor
    commits: Tensor
    confidence: Tensor
    positions: Tensor
    logits: Tensor
    all_logits: Tensor | None


class StepObserver:
    """Looks at every step of a `HostLoop`, and changes nothing.

    Attributes:
        wants_all_logits: whether the loop has to keep all rows to the end and to compute logits at every position.
    """

    wants_all_logits = False

    def begin(self, token_ids: Tensor) -> None:
        """Sees the fresh blocks, int64 [num_reqs, block_size]."""

    def observe(self, step: ObservedStep) -> None:
        """Sees a step that is done."""


class TraceRecorder(StepObserver):
    """Records how each block came about.

    Attributes:
        traces: per row of the call.
    """

    def __init__(self) -> None:
        self.traces: list[BlockTrace] = []

    def begin(self, token_ids: Tensor) -> None:
        """See `StepObserver.begin`."""
        self.traces = [BlockTrace([block], [], []) for block in token_ids.tolist()]

    def observe(self, step: ObservedStep) -> None:
        """See `StepObserver.observe`."""
        block_size = step.token_ids.shape[1]
        blocks, num_commits = step.token_ids.tolist(), step.commits.sum(-1).tolist()
        for i, row in enumerate(step.rows):
            if step.num_open[i]:
                trace = self.traces[row]
                trace.xt.append(blocks[i])
                trace.t.append(step.num_masked[i] / block_size)
                trace.commits.append(num_commits[i])


class FirstStepProbs(StepObserver):
    """Keeps the distributions that the picks of the first step are drawn from.

    Attributes:
        probs: float [num_reqs, block_size, vocab], undefined at first tokens that were given; None where no step was
            taken.
    """

    def __init__(self, picker: TokenPicker) -> None:
        """Takes the picker of the loop it looks at."""
        self.probs: Tensor | None = None
        self._picker = picker

    def observe(self, step: ObservedStep) -> None:
        """See `StepObserver.observe`."""
        if step.index == 0:
            picked_from = self._picker.probs(step.logits)
            probs = step.confidence.new_zeros(step.token_ids.numel(), picked_from.shape[-1])
            probs[step.positions] = picked_from.to(probs.dtype)
            self.probs = probs.view(*step.token_ids.shape, -1)


class StepCallback(Protocol):
    """Called with the fresh block (`logits` None), then after every step with the block that the step read."""

    def __call__(
        self, step_idx: int, steps_per_block: int, xt: Tensor, *, t: float, logits: Tensor | None, block_idx: int
    ) -> None:
        """Looks at one step.

        Args:
            step_idx: counts from 0 within the block.
            steps_per_block: the limit.
            xt: int64 [num_active, block_size].
            t: masked fraction, the mean over the rows.
            logits: [num_active, block_size, vocab], the mask token not excluded.
            block_idx: counts from 0.
        """
        ...


class StepCallbackObserver(StepObserver):
    """Calls a `StepCallback` as the published code does."""

    wants_all_logits = True

    def __init__(self, callback: StepCallback, steps_per_block: int, block_idx: int) -> None:
        """Takes what every call of the block is told."""
        self._callback, self._steps_per_block, self._block_idx = callback, steps_per_block, block_idx

    def begin(self, token_ids: Tensor) -> None:
        """See `StepObserver.begin`."""
        self._callback(0, self._steps_per_block, token_ids, t=1.0, logits=None, block_idx=self._block_idx)

    def observe(self, step: ObservedStep) -> None:
        """See `StepObserver.observe`."""
        assert step.all_logits is not None
        self._callback(
            step.index,
            self._steps_per_block,
            step.before,
            t=sum(step.num_masked) / len(step.num_masked) / step.before.shape[1],
            logits=step.all_logits.unflatten(0, tuple(step.before.shape)),
            block_idx=self._block_idx,
        )
