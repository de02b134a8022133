"""Which masked positions are committed in a denoising step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from twotower_kernels.unmasking import choose_commits


@dataclass(frozen=True)
class DenoisingStep:
    """Blocks after a denoiser pass, before anything of it is committed.

    Attributes:
        index: counts from 0.
        rows: index of every block among those of the call; blocks that are done have left.
        masked: bool [num_active, block_size].
        confidence: float [num_active, block_size], of the pick at masked positions, of the committed token elsewhere
            (as it was when it was committed).
    """

    index: int
    rows: Sequence[int]
    masked: Tensor
    confidence: Tensor


class CommitRule(Protocol):
    """Decides what a step commits."""

    def commits(self, step: DenoisingStep) -> Tensor:
        """Positions to commit, bool [num_active, block_size], at least one masked one of every block that has any."""
        ...


@dataclass(frozen=True)
class PublishedSchedule:
    """Every pick above a threshold, and at least as many as finish the block in time.

    Attributes:
        confidence_threshold: strict bound.
        steps_per_block: the last step commits everything.

    Source: modeling_nemotron_twotower.py, generate_mask_diffusion.
    """

    confidence_threshold: float
    steps_per_block: int

    def commits(self, step: DenoisingStep) -> Tensor:
        """See `CommitRule.commits`."""
        remaining = self.steps_per_block - step.index
        return choose_commits(step.confidence, step.masked, self.confidence_threshold, remaining)
