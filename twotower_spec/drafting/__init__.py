"""Drafting with the denoiser tower, and verification that leaves the target's text as it is."""

from twotower_spec.drafting.adaptive import AdaptivePolicy
from twotower_spec.drafting.draft_block import DraftBlock, Provenance
from twotower_spec.drafting.drafter import BlockDrafter
from twotower_spec.drafting.metrics import DraftingMetrics, DraftingReport
from twotower_spec.drafting.policies import DraftPlan, DraftPolicy, FixedPolicy, RoundOutcome, ThresholdPolicy
from twotower_spec.drafting.speculative_loop import (
    SpeculativeResult,
    SpeculativeRun,
    SpeculativeStep,
    speculative_loop,
)
from twotower_spec.drafting.verification import RULES, Verdict, VerificationRule, verification_rule
from twotower_spec.drafting.vocabulary import (
    TokenDifference,
    VocabularyComparison,
    compare_vocabularies,
    shared_token_ids,
)

__all__ = [
    "RULES",
    "AdaptivePolicy",
    "BlockDrafter",
    "DraftBlock",
    "DraftPlan",
    "DraftPolicy",
    "DraftingMetrics",
    "DraftingReport",
    "FixedPolicy",
    "Provenance",
    "RoundOutcome",
    "SpeculativeResult",
    "SpeculativeRun",
    "SpeculativeStep",
    "ThresholdPolicy",
    "TokenDifference",
    "Verdict",
    "VerificationRule",
    "VocabularyComparison",
    "compare_vocabularies",
    "shared_token_ids",
    "speculative_loop",
    "verification_rule",
]
