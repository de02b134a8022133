"""How long to denoise, and how much of a block to draft: one protocol, three policies. All leave the text as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from twotower_kernels.unmasking import choose_commits
from twotower_spec.config import DiffusionConfig, check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising import CommitRule, DenoisingStep, PublishedSchedule, Schedule


@dataclass(frozen=True)
class DraftPlan:
    """What one round does.

    Attributes:
        block_size: positions that are denoised.
        num_tokens: most drafts of it that are used, from the left.
        rule: what each denoising step commits.
    """

    block_size: int
    num_tokens: int
    rule: CommitRule


@dataclass(frozen=True)
class RoundOutcome:
    """What came of a round, for a policy to learn from.

    Attributes:
        plan: of the round; None where nothing was drafted.
        num_draft_tokens, num_accepted: per request.
        confidence: float32 [num_reqs, num_tokens] of the drafts; None with the plan.
        num_denoiser_passes: per request.
        num_context_tokens: that the context tower read, of all requests.
        extend_s, denoise_s, verify_s: seconds of the three phases, of the whole batch.
        with_prompts: whether the target read prompts in the same pass: `verify_s` is not the price of drafts alone.
    """

    plan: DraftPlan | None
    num_draft_tokens: Sequence[int]
    num_accepted: Sequence[int]
    confidence: Tensor | None
    num_denoiser_passes: Sequence[int]
    num_context_tokens: int
    extend_s: float
    denoise_s: float
    verify_s: float
    with_prompts: bool = False


class DraftPolicy(Protocol):
    """Decides how a round drafts; may learn from what became of it."""

    num_speculative_tokens: int
    """Most drafts of any round."""

    most_steps: int
    """Most denoising steps of any round."""

    selects_drafts: bool
    """Whether `usable` looks at the drafts' confidence; what is verified is then no plain sample any more."""

    def plan(self, num_reqs: int) -> DraftPlan | None:
        """What to do for `num_reqs` requests; None to draft nothing this round."""
        ...

    def usable(self, plan: DraftPlan, confidence: Tensor, num_denoiser_passes: Sequence[int]) -> list[int]:
        """How many drafts of every request are worth verifying.

        Args:
            plan: of this round.
            confidence: float32 [num_reqs, num_tokens].
            num_denoiser_passes: per request.
        """
        ...

    def observe(self, outcome: RoundOutcome) -> None:
        """Learns from a verified round; rounds without drafts are told too."""
        ...


class _SteadyPolicy:
    """The same plan in every round, all drafts used."""

    selects_drafts = False

    def __init__(self, block_size: int, most_steps: int, num_tokens: int | None, rule: CommitRule) -> None:
        num_tokens = block_size if num_tokens is None else num_tokens
        check_integer("num_tokens", num_tokens, minimum=1)
        if num_tokens > block_size:
            raise ArgumentError(
                f"num_tokens {num_tokens} is more than block_size {block_size}; give {block_size} or fewer"
            )
        self.num_speculative_tokens, self.most_steps = num_tokens, most_steps
        self._plan = DraftPlan(block_size, num_tokens, rule)

    def plan(self, num_reqs: int) -> DraftPlan | None:
        """See `DraftPolicy.plan`."""
        return self._plan

    def usable(self, plan: DraftPlan, confidence: Tensor, num_denoiser_passes: Sequence[int]) -> list[int]:
        """See `DraftPolicy.usable`."""
        return [plan.num_tokens] * len(confidence)

    def observe(self, outcome: RoundOutcome) -> None:
        """See `DraftPolicy.observe`; nothing is learnt."""


class ThresholdPolicy(_SteadyPolicy):
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
        config = DiffusionConfig(block_size, steps_per_block, confidence_threshold)
        super().__init__(
            block_size, steps_per_block, num_tokens, PublishedSchedule(config.confidence_threshold, steps_per_block)
        )


class FixedPolicy(_SteadyPolicy):
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
        config = DiffusionConfig(block_size, num_steps, confidence_threshold)
        super().__init__(block_size, num_steps, num_tokens, FixedSteps(num_steps, config.confidence_threshold))


@dataclass(frozen=True)
class FixedSteps(Schedule):
    """The commit rule of `FixedPolicy`."""

    num_steps: int
    confidence_threshold: float

    def remaining_steps(self, index: int, block_size: int) -> int:
        """See `Schedule.remaining_steps`; before the last step nothing presses."""
        return 1 if index >= self.num_steps - 1 else block_size


def confident(step: DenoisingStep, confidence_threshold: float) -> Tensor:
    """The picks above a threshold, or the most confident one where there is none."""
    return choose_commits(step.confidence, step.masked, confidence_threshold, step.masked.shape[1])
