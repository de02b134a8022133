"""One round of speculative decoding: requests, drafts, and the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from twotower_spec.drafting.draft_block import DraftBlock
from twotower_spec.drafting.policies.policy import DraftPlan, RoundOutcome
from twotower_spec.generation.phase_times import PhaseTimes
from twotower_spec.state.context_state import RequestId
from twotower_spec.state.token_history import TokenSequence


class DraftRequest(NamedTuple):
    """One request of a round.

    Attributes:
        request_id: names the request over all rounds.
        token_ids: all of its token ids so far, prompt included; an array is cheaper to compare with what was read.
        max_draft_tokens: most drafts that it can use; None for all that a round may bring.
        read_only: its context is brought up to date and nothing drafted: the target is still reading its prompt.
        seed: of sampling noise; None for the session's. The most probable tokens need none.
    """

    request_id: RequestId
    token_ids: TokenSequence
    max_draft_tokens: int | None = None
    read_only: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class RoundResult:
    """The target's answer to a round's drafts, per request in the order of its rows.

    Attributes:
        num_accepted: drafts kept; None for a request that the target did not run.
        verify_s: seconds from the drafts to the target's answer for the whole batch.
        num_verified: drafts that the target looked at, where that may be fewer than were given; None for all.
        with_prompts: whether the target read prompts in the same pass, which take time of their own.
        num_rested: rounds since the drafts that were left out, see `DraftPolicy.num_rests`.
    """

    num_accepted: Sequence[int | None]
    verify_s: float
    num_verified: Sequence[int] | None = None
    with_prompts: bool = False
    num_rested: int = 0


@dataclass(frozen=True)
class Round:
    """Drafts of one call of `DraftingSession.draft`; `observe` takes them back with the target's result.

    Attributes:
        block: the drafts, a row per request in the order given.
        plan: what the policy decided; None to draft nothing.
        num_context_tokens: tokens that the context tower read.
        times: seconds of the towers; on CUDA to be read when the round is over.
        host_s: seconds until the drafts were given, by the host's clock.
        without_drafts: requests that got none, by reason (see `DraftingSession.without_drafts`).
        num_denoised, num_damaged: requests that the denoiser worked for, and those of them for which it gave NaN.
        foreseen, refused: as of `RoundOutcome`.
    """

    block: DraftBlock
    plan: DraftPlan | None
    num_context_tokens: int = 0
    times: PhaseTimes = field(default_factory=PhaseTimes)
    host_s: float = 0.0
    without_drafts: Counter[str] = field(default_factory=Counter)
    num_denoised: int = 0
    num_damaged: int = 0
    foreseen: Mapping[RequestId, Sequence[bool]] = field(default_factory=dict)
    refused: Collection[RequestId] = ()

    @property
    def late_s(self) -> float:
        """Seconds that the towers went on after the drafts were given.

        On CUDA nothing waits for a round that only reads; the target's answer then comes that much later.
        """
        return max(0.0, self.times.total_s - self.host_s)

    def outcome(self, result: RoundResult) -> RoundOutcome:
        """Joins what was drafted with what the target made of it, over the requests that it ran."""
        block = self.block
        verified = block.num_draft_tokens if result.num_verified is None else result.num_verified
        ran = [row for row, count in enumerate(result.num_accepted) if count is not None]
        return RoundOutcome(
            plan=self.plan,
            num_draft_tokens=[verified[row] for row in ran],
            num_given=[block.num_draft_tokens[row] for row in ran],
            num_accepted=[count for count in result.num_accepted if count is not None],
            confidence=block.confidence if len(ran) == len(block.request_ids) else block.confidence[ran],
            num_denoiser_passes=[block.num_denoiser_passes[row] for row in ran],
            num_context_tokens=self.num_context_tokens,
            extend_s=self.times.extend_s,
            denoise_s=self.times.denoise_s,
            verify_s=max(0.0, result.verify_s - self.late_s),
            with_prompts=result.with_prompts,
            num_planned=len(block.request_ids),
            request_ids=[block.request_ids[row] for row in ran],
            num_denoised=self.num_denoised,
            host_s=max(0.0, self.host_s - self.times.extend_s - self.times.denoise_s),
            foreseen=self.foreseen,
            refused=self.refused,
            num_rested=result.num_rested,
        )
