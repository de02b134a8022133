"""The same decision in every round: a fixed number of denoising steps, or any other steady plan."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from twotower_spec.config import check_integer, check_schedule
from twotower_spec.drafting.policies.policy import Candidate, DraftPlan, RoundOutcome
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising import CommitRule, Schedule


class SteadyPolicy:
    """Decides the same in every round, and uses all drafts."""

    selects_drafts = learns_from_reading = False
    num_rests = 0

    def __init__(self, block_size: int, most_steps: int, num_tokens: int | None, commit_rule: CommitRule) -> None:
        num_tokens = block_size if num_tokens is None else num_tokens
        check_integer("num_tokens", num_tokens, minimum=1)
        if num_tokens > block_size:
            raise ArgumentError(
                f"num_tokens {num_tokens} is more than block_size {block_size}; give {block_size} or fewer"
            )
        self.num_speculative_tokens, self.most_steps = num_tokens, most_steps
        self._plan = DraftPlan(block_size, num_tokens, commit_rule)

    def plan(
        self, num_reqs: int, candidates: Sequence[Candidate] = (), *, whole_batch: bool = False
    ) -> DraftPlan | None:
        """See `DraftPolicy.plan`."""
        return self._plan

    def learn_costs(self, num_tokens: int, num_rows: int, block_size: int, extend_s: float, denoise_s: float) -> None:
        """Learns nothing; see `DraftPolicy.learn_costs`."""

    def worth_denoising(self, plan: DraftPlan, request_ids: Sequence[Hashable], confidence: Tensor) -> list[bool]:
        """See `DraftPolicy.worth_denoising`."""
        return [True] * len(request_ids)

    def usable(self, plan: DraftPlan, confidence: Tensor, num_denoiser_passes: Sequence[int]) -> list[int]:
        """See `DraftPolicy.usable`."""
        return [plan.num_tokens] * len(confidence)

    def observe(self, outcome: RoundOutcome) -> None:
        """Learns nothing; see `DraftPolicy.observe`."""

    def forget(self, request_id: Hashable) -> None:
        """Has nothing to forget; see `DraftPolicy.forget`."""


class FixedPolicy(SteadyPolicy):
    """A fixed number of steps; what is still masked then is filled with its best guess.

    Use it where the costs are known and steady: one step is the cheapest draft there is.

    Args:
        block_size: positions that are denoised.
        num_steps: denoising steps.
        confidence_threshold: what is above it is committed before the last step, and the best pick in any case.
        num_tokens: drafts that are used; None for the whole block.

    Raises:
        ArgumentError: a value is out of range.
    """

    def __init__(
        self,
        block_size: int = 8,
        num_steps: int = 1,
        confidence_threshold: float = 0.8,
        num_tokens: int | None = None,
    ) -> None:
        check_schedule(block_size, num_steps, confidence_threshold)
        super().__init__(block_size, num_steps, num_tokens, FixedSteps(num_steps, confidence_threshold))


@dataclass(frozen=True)
class FixedSteps(Schedule):
    """The commit rule of `FixedPolicy`."""

    num_steps: int
    confidence_threshold: float

    def remaining_steps(self, index: int, block_size: int) -> int:
        """Sets no pace before the last step, which commits everything; see `Schedule.remaining_steps`."""
        return 1 if index >= self.num_steps - 1 else block_size
