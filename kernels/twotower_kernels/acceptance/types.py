"""Arguments and results of a verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

AcceptanceRule = Literal["one-hot", "coupled"]

# Numbers that tell the draws of the noise apart: the target's own sample (coupled rule); whether a draft is accepted,
# and the token after the accepted ones (one-hot rule).
SAMPLE_DRAW = 0
ACCEPT_DRAW = 1 << 16
NEXT_TOKEN_DRAW = ACCEPT_DRAW + 1

# Stands in `token_ids` where there is no token.
PLACEHOLDER = -1


@dataclass(frozen=True)
class SamplingTensors:
    """Sampling parameters of every request, as tensors.

    Attributes:
        temperature: float32 [num_reqs], 0 for the most probable token; None if that holds for all of them.
        top_k: int32 [num_reqs], below 1 or at least the vocabulary for all tokens; None if that holds for all requests.
        top_p: float32 [num_reqs], 1 for all tokens; None likewise.
        min_p: float32 [num_reqs], 0 for all tokens; None likewise.
        seeds: int64 [num_reqs], of the noise.
        positions: int64 [num_reqs], index of the first draft in its sequence.
    """

    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    seeds: Tensor
    positions: Tensor

    @property
    def filters(self) -> bool:
        """Whether tokens may be excluded."""
        return not (self.top_k is None and self.top_p is None and self.min_p is None)

    def of(self, requests: slice) -> SamplingTensors:
        """Selects some of the requests."""

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[requests]

        filters = some(self.temperature), some(self.top_k), some(self.top_p), some(self.min_p)
        return SamplingTensors(*filters, self.seeds[requests], self.positions[requests])


@dataclass(frozen=True)
class Accepted:
    """Outcome of a verification.

    Attributes:
        token_ids: int32 [num_reqs, max_num_draft_tokens + 1]: accepted drafts, the token after them, then -1.
        num_accepted: int32 [num_reqs].
    """

    token_ids: Tensor
    num_accepted: Tensor
