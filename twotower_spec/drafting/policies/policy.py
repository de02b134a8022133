"""Protocol of policies: what they decide, and the outcomes they learn from. No decision changes the text."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from twotower_spec.generation.denoising import CommitRule

# Tokens of a pass that are compared with what the context tower would have picked, at most: logits are made for all of
# them, [tokens, vocabulary].
MOST_COMPARED = 256


class Candidate(NamedTuple):
    """One request that may be drafted for.

    Attributes:
        request_id: names the request over all rounds.
        num_unread: tokens of it that the context tower has not read.
        max_draft_tokens: most drafts that it can use; None for any number.
    """

    request_id: Hashable
    num_unread: int = 0
    max_draft_tokens: int | None = None


@dataclass(frozen=True)
class DraftPlan:
    """A policy's decision for one round.

    Attributes:
        block_size: positions that are denoised.
        num_tokens: most drafts of it that are used, from the left; 0 to have contexts read and nothing drafted.
        commit_rule: what each denoising step commits.
        rows: places of the candidates that are drafted for; the context tower reads nothing of the others. None for
            all.
        most_context_tokens: that the context tower reads; None for no other limit than the session's.
        limits: most drafts of requests that can use fewer than `num_tokens`.
        whole_batch: the target verifies `num_tokens` of every request.
    """

    block_size: int
    num_tokens: int
    commit_rule: CommitRule
    rows: frozenset[int] | None = None
    most_context_tokens: int | None = None
    limits: Mapping[Hashable, int] = field(default_factory=dict)
    whole_batch: bool = False

    def chooses(self, row: int) -> bool:
        """Whether a candidate is drafted for."""
        return self.rows is None or row in self.rows


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
        request_ids: of the rows; empty to name them by their places.
        num_denoised: rows that the denoiser worked for; None for those that have drafts.
        host_s: seconds of drafting that are none of the towers'.
        foreseen: by request that was read late, whether the context tower would have picked each token; oldest first.
        refused: requests of the plan whose context cannot be read.
        num_given: per request, drafts that the target was given, of which it may have verified fewer; empty for all.
        num_rested: rounds without drafts, like this one, that nobody was told of.
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
    request_ids: Sequence[Hashable] = ()
    num_denoised: int | None = None
    host_s: float = 0.0
    foreseen: Mapping[Hashable, Sequence[bool]] = field(default_factory=dict)
    refused: Collection[Hashable] = ()
    num_given: Sequence[int] = ()
    num_rested: int = 0


class DraftPolicy(Protocol):
    """Decides how a round drafts; may learn from what became of it."""

    num_speculative_tokens: int
    """Most drafts of any round."""

    most_steps: int
    """Most denoising steps of any round."""

    num_rests: int
    """Rounds that may be left out after the one that was planned last: they would have no drafts either."""

    learns_from_reading: bool
    """Whether it wants to know which of the tokens that are read late the context tower would have picked."""

    selects_drafts: bool
    """Whether drafts are chosen by their confidence; what is verified is then no plain sample any more."""

    def plan(
        self, num_reqs: int, candidates: Sequence[Candidate] = (), *, whole_batch: bool = False
    ) -> DraftPlan | None:
        """Decides how to draft, and for which requests; nothing of the round was done yet.

        Args:
            num_reqs: requests of the round.
            candidates: all of them, in their order; empty where nothing is known of them.
            whole_batch: the target verifies as many drafts of every request, whether it has them or not.

        Returns:
            None to draft nothing this round.
        """
        ...

    def learn_costs(self, num_tokens: int, num_rows: int, block_size: int, extend_s: float, denoise_s: float) -> None:
        """Learns what a trial took, of the warm-up.

        Args:
            num_tokens: that the context tower read; 0 for no such pass.
            num_rows, block_size: of one denoiser pass.
            extend_s, denoise_s: seconds of both.
        """
        ...

    def worth_denoising(self, plan: DraftPlan, request_ids: Sequence[Hashable], confidence: Tensor) -> list[bool]:
        """Which of the plan's requests are drafted for, now that their contexts are read; asked if `selects_drafts`.

        Args:
            plan: this round's.
            request_ids: of the rows.
            confidence: float32 [num_reqs], the context tower's in their first drafts.
        """
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
        """Learns from a verified round; rounds without drafts are told too, but for those that were left out."""
        ...

    def forget(self, request_id: Hashable) -> None:
        """Forgets a request that has ended; unknown ids are ignored."""
        ...
