"""Protocol of policies: what they decide, and the outcomes they learn from. No decision changes the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from twotower_spec.generation.denoising import CommitRule


@dataclass(frozen=True)
class DraftPlan:
    """A policy's decision for one round.

    Attributes:
        block_size: positions that are denoised.
        num_tokens: most drafts of it that are used, from the left.
        commit_rule: what each denoising step commits.
    """

    block_size: int
    num_tokens: int
    commit_rule: CommitRule


@dataclass(frozen=True)
class RoundOutcome:
    """Outcome of a round, for a policy to learn from; its requests are those that the target ran.

    Attributes:
        plan: the policy's own for this round; None where nothing was drafted.
        num_draft_tokens, num_accepted: per request, drafts that were verified and those of them that were kept.
        confidence: float32 [num_reqs, num_tokens], the drafts' own; [num_reqs, 0] where nothing was drafted.
        num_denoiser_passes: per request.
        num_context_tokens: tokens that the context tower read, of all requests of the round.
        extend_s, denoise_s, verify_s: seconds of the three phases, for the whole batch.
        with_prompts: whether the target read prompts in the same pass, so that `verify_s` is not the price of drafts
            alone.
        num_planned: requests that the plan was made for, where the target did not run all of them; None for those here.
    """

    plan: DraftPlan | None
    num_draft_tokens: Sequence[int]
    num_accepted: Sequence[int]
    confidence: Tensor
    num_denoiser_passes: Sequence[int]
    num_context_tokens: int
    extend_s: float
    denoise_s: float
    verify_s: float
    with_prompts: bool = False
    num_planned: int | None = None


class DraftPolicy(Protocol):
    """Decides how a round drafts; may learn from what became of it."""

    num_speculative_tokens: int
    """Most drafts of any round."""

    most_steps: int
    """Most denoising steps of any round."""

    selects_drafts: bool
    """Whether `usable` looks at the drafts' confidence; what is verified is then no plain sample any more."""

    def plan(self, num_reqs: int) -> DraftPlan | None:
        """Decides how to draft for `num_reqs` requests; None to draft nothing this round."""
        ...

    def usable(self, plan: DraftPlan, confidence: Tensor, num_denoiser_passes: Sequence[int]) -> list[int]:
        """How many drafts of every request are worth verifying.

        Args:
            plan: this round's.
            confidence: float32 [num_reqs, num_tokens].
            num_denoiser_passes: per request.
        """
        ...

    def observe(self, outcome: RoundOutcome) -> None:
        """Learns from a verified round; rounds without drafts are told too."""
        ...
