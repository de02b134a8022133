"""How long to denoise, and how much of a block to draft: one protocol, three policies."""

from twotower_spec.drafting.policies.adaptive import AdaptivePolicy
from twotower_spec.drafting.policies.fixed import FixedPolicy, FixedSteps
from twotower_spec.drafting.policies.policy import Candidate, DraftPlan, DraftPolicy, RoundOutcome
from twotower_spec.drafting.policies.threshold import ThresholdPolicy

__all__ = [
    "AdaptivePolicy",
    "Candidate",
    "DraftPlan",
    "DraftPolicy",
    "FixedPolicy",
    "FixedSteps",
    "RoundOutcome",
    "ThresholdPolicy",
]
