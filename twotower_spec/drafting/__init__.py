"""Drafting with the denoiser tower, and verification that leaves the target's text as it is."""

from twotower_spec.drafting.async_session import AsyncRequest, AsyncRound, AsyncSession
from twotower_spec.drafting.block_drafter import BlockDrafter
from twotower_spec.drafting.draft_block import DraftBlock, Provenance
from twotower_spec.drafting.hosted_session import HostedSession
from twotower_spec.drafting.metrics import DraftingMetrics, DraftingSummary
from twotower_spec.drafting.policies import (
    AdaptivePolicy,
    DraftPlan,
    DraftPolicy,
    FixedPolicy,
    RoundOutcome,
    ThresholdPolicy,
)
from twotower_spec.drafting.round import DraftRequest, Round, RoundResult
from twotower_spec.drafting.rounds import DraftingRounds
from twotower_spec.drafting.session import DraftingSession
from twotower_spec.drafting.speculative_loop import (
    SpeculativeResult,
    SpeculativeRun,
    SpeculativeStep,
    speculative_loop,
)
from twotower_spec.drafting.verification import (
    VERIFICATION_RULES,
    VerificationOutcome,
    VerificationRule,
    find_verification_rule,
)
from twotower_spec.drafting.vocabulary import (
    TokenDifference,
    VocabularyComparison,
    compare_vocabularies,
    shared_token_ids,
)

__all__ = [
    "VERIFICATION_RULES",
    "AdaptivePolicy",
    "AsyncRequest",
    "AsyncRound",
    "AsyncSession",
    "BlockDrafter",
    "DraftBlock",
    "DraftPlan",
    "DraftPolicy",
    "DraftRequest",
    "DraftingMetrics",
    "DraftingRounds",
    "DraftingSession",
    "DraftingSummary",
    "FixedPolicy",
    "HostedSession",
    "Provenance",
    "Round",
    "RoundOutcome",
    "RoundResult",
    "SpeculativeResult",
    "SpeculativeRun",
    "SpeculativeStep",
    "ThresholdPolicy",
    "TokenDifference",
    "VerificationOutcome",
    "VerificationRule",
    "VocabularyComparison",
    "compare_vocabularies",
    "find_verification_rule",
    "shared_token_ids",
    "speculative_loop",
]
