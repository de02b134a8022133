"""The published schedule as a policy."""

from __future__ import annotations

from twotower_spec.config import check_schedule
from twotower_spec.drafting.policies.fixed import SteadyPolicy
from twotower_spec.generation.denoising import PublishedSchedule


class ThresholdPolicy(SteadyPolicy):
    """The published schedule: commits what is above a threshold, and finishes in the given number of steps.

    Use it to draft exactly what the model would write on its own, to compare with published figures, or where passes
    are nearly free.

    Args:
        block_size: positions that are denoised.
        steps_per_block: most denoising steps.
        confidence_threshold: strict bound; the model card recommends 0.8.
        num_tokens: drafts that are used; None for the whole block.

    Raises:
        ArgumentError: a value is out of range.
    """

    def __init__(
        self,
        block_size: int = 16,
        steps_per_block: int = 16,
        confidence_threshold: float = 0.8,
        num_tokens: int | None = None,
    ) -> None:
        check_schedule(block_size, steps_per_block, confidence_threshold)
        schedule = PublishedSchedule(confidence_threshold, steps_per_block)
        super().__init__(block_size, steps_per_block, num_tokens, schedule)
