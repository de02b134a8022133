"""How long to denoise: the commit rule of the adaptive policy, and what another step has brought so far."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower_kernels.unmasking import choose_commits
from twotower_spec.drafting.policies.acceptance import MOST_COUNTED, Calibration
from twotower_spec.drafting.policies.looks import Look
from twotower_spec.generation.denoising import DenoisingStep
from twotower_spec.state.transfer import to_device

# Values before a step are told apart in classes of this width, in tokens.
VALUE_CLASS = 0.75


@dataclass
class StepGain:
    """Mean value that another step has added to blocks."""

    count: int = 0
    mean: float = 0.0

    def add(self, gain: float) -> None:
        """Counts a step."""
        self.count = min(self.count + 1, MOST_COUNTED)
        self.mean += (gain - self.mean) / self.count


class StepGains:
    """Gains by block size, number of steps before, and value of the block before."""

    def __init__(self) -> None:
        """Knows nothing."""
        self._gains: dict[tuple[int, int, int], StepGain] = defaultdict(StepGain)

    def of(self, block_size: int, step: int, value: float) -> StepGain:
        """Looks up what a step after `step` brought blocks of about this value."""
        return self._gains[block_size, step, int(value / VALUE_CLASS)]


@dataclass(frozen=True)
class Prices:
    """Prices of a round, in tokens: what drafts and steps must bring to be worth it.

    Attributes:
        token: for verifying one draft more.
        second: tokens that the round's time brings, per second.
        step: for one more pass of the denoiser, all rows together; infinite where its time is not known.
        may_try: whether a step may be taken to see whether what it brings has changed.
    """

    token: float
    second: float
    step: float
    may_try: bool


class AdaptiveSteps:
    """Goes on with the rows for which another step is worth its time.

    The value of a block is its expected number of accepted drafts less their price; another step is worth its time
    where the value that it has added to such blocks is more than its price, all rows together.

    Attributes:
        num_tried: steps that were taken to learn what they bring, one at most.
        unlikely: requests for which nothing was denoised, after all, because their first draft is improbable.
    """

    def __init__(
        self,
        calibration: Calibration,
        gains: StepGains,
        block_size: int,
        most_steps: int,
        threshold: float,
        prices: Prices,
        look: Look | None = None,
    ) -> None:
        """Decides for one round.

        Args:
            calibration: of confidences.
            gains: of steps, which it adds to.
            block_size, most_steps: of the blocks.
            threshold: what is above it is committed before the last step.
            prices: of this round.
            look: that the round is part of.
        """
        self.calibration, self.gains, self.prices = calibration, gains, prices
        self.block_size, self.most_steps, self.threshold = block_size, most_steps, threshold
        self.num_tried, self.look = 0, look
        self.unlikely: frozenset[Hashable] = frozenset()
        self._before: dict[int, float] = {}

    def finishes(self, index: int, block_size: int) -> bool:
        """See `CommitRule.finishes`."""
        return index + 1 >= self.most_steps or math.isinf(self.prices.step)

    def commits(self, step: DenoisingStep) -> Tensor:
        """See `CommitRule.commits`."""
        is_last, rows = self.finishes(step.index, self.block_size), step.rows
        if is_last and not self._before:  # nothing is learnt of a first step
            return step.masked
        survival = self.calibration.survival(self.block_size, [step.index + 1] * len(rows), step.confidence)
        values = np.clip(survival - self.prices.token, 0.0, None).sum(axis=1).tolist()
        for row, value in zip(rows, values, strict=True):
            if row in self._before:
                self.gains.of(self.block_size, step.index - 1, self._before[row]).add(value - self._before[row])
        if is_last:
            return step.masked
        going_on = self._going_on([self.gains.of(self.block_size, step.index, value) for value in values])
        self._before = {row: value for row, value, goes in zip(rows, values, going_on, strict=True) if goes}
        keep = to_device(going_on, step.masked.device)
        # The picks above the threshold, or the most confident one where there is none.
        confident = choose_commits(step.confidence, step.masked, self.threshold, step.masked.shape[1])
        return torch.where(keep[:, None], confident, step.masked)

    def _going_on(self, gains: Sequence[StepGain]) -> list[bool]:
        """Rows that bring at least their share of a step's price, if together they bring all of it."""
        price = self.prices.step
        going_on = [gain.mean > price / len(gains) for gain in gains]
        if sum(gain.mean for gain, goes in zip(gains, going_on, strict=True) if goes) > price:
            return going_on
        tries = self.prices.may_try and not self.num_tried
        self.num_tried += tries
        return [tries] * len(gains)
