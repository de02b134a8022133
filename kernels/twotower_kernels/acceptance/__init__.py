"""Verification of drafts from raw target logits: which drafts are accepted, and the token after them."""

from twotower_kernels.acceptance.op import accept, filtered_logits, warm_up
from twotower_kernels.acceptance.types import (
    ACCEPT_DRAW,
    NEXT_TOKEN_DRAW,
    SAMPLE_DRAW,
    AcceptanceRule,
    Accepted,
    SamplingTensors,
)

__all__ = [
    "ACCEPT_DRAW",
    "NEXT_TOKEN_DRAW",
    "SAMPLE_DRAW",
    "AcceptanceRule",
    "Accepted",
    "SamplingTensors",
    "accept",
    "filtered_logits",
    "warm_up",
]
