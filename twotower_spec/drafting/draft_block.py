"""Drafts of a round: tokens, how sure the drafter was, and how they came about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower_spec.state.context_state import RequestId

Noise = Literal["none", "private", "shared"]


@dataclass(frozen=True)
class Provenance:
    """How drafts were made: what decides which verification rules are exact for them.

    Attributes:
        num_steps: denoising steps of the row that took most.
        noise: "none" for the most probable tokens; "private" for samples with noise that nobody else uses; "shared" for
            samples with the noise that the coupled rule samples the target with.
        known_probs: whether the distribution that each draft was drawn from, given those to its left, is known.
    """

    num_steps: int
    noise: Noise
    known_probs: bool


@dataclass(frozen=True)
class DraftBlock:
    """Drafts of one round, a row per request.

    Attributes:
        request_ids: in the order of the rows.
        block_size: positions that were denoised; 0 where nothing was.
        token_ids: int64 [num_reqs, num_speculative_tokens], -1 where a request has fewer.
        num_draft_tokens: usable drafts per request; 0 where its context is not computed yet, or drafting does not pay.
        confidence: float32 [num_reqs, num_speculative_tokens], probability of each draft under the tower that made it,
            when it was committed; 0 where there is none.
        num_denoiser_passes: per request.
        num_context_passes: per request, of the context tower.
        provenance: how the drafts were made.
        probs: float [num_reqs, num_speculative_tokens, vocab], the distribution every draft was drawn from given the
            drafts to its left; None unless drafts are samples made in one step.
    """

    request_ids: tuple[RequestId, ...]
    block_size: int
    token_ids: Tensor
    num_draft_tokens: list[int]
    confidence: Tensor
    num_denoiser_passes: list[int]
    num_context_passes: list[int]
    provenance: Provenance
    probs: Tensor | None = None

    @classmethod
    def empty(cls, request_ids: tuple[RequestId, ...]) -> DraftBlock:
        """No drafts for anyone."""
        num_reqs = len(request_ids)
        return cls(
            request_ids=request_ids,
            block_size=0,
            token_ids=torch.full((num_reqs, 0), -1),
            num_draft_tokens=[0] * num_reqs,
            confidence=torch.zeros(num_reqs, 0),
            num_denoiser_passes=[0] * num_reqs,
            num_context_passes=[0] * num_reqs,
            provenance=Provenance(0, "none", False),
        )

    def rows(self) -> list[list[int]]:
        """Drafts of every request, as Python integers."""
        token_ids: list[list[int]] = self.token_ids.tolist()
        return [row[:count] for row, count in zip(token_ids, self.num_draft_tokens, strict=True)]

    def row(self, index: int) -> list[int]:
        """Drafts of one request."""
        tokens: list[int] = self.token_ids[index, : self.num_draft_tokens[index]].tolist()
        return tokens
