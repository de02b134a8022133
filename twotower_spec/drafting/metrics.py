"""Figures that a run of speculative decoding is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_CALIBRATION_BINS = 10
_EDGES = np.linspace(0, 1, NUM_CALIBRATION_BINS + 1)
# Lower and upper bound of every bin.
CALIBRATION_BINS = tuple((round(float(low), 3), round(float(high), 3)) for low, high in pairwise(_EDGES))


def bins_of(confidence: NDArray[np.floating[Any]]) -> NDArray[np.intp]:
    """Index in `CALIBRATION_BINS` of each confidence."""
    return np.clip(np.digitize(confidence, _EDGES) - 1, 0, NUM_CALIBRATION_BINS - 1)


@dataclass(frozen=True)
class CalibrationBin:
    """Drafts of about one confidence that were decided on: all to their left had been accepted.

    Attributes:
        low, high: bounds of the confidence.
        num_drafts: drafts in it.
        mean_confidence, acceptance_rate: over them; 0 without any.
    """

    low: float
    high: float
    num_drafts: int
    mean_confidence: float
    acceptance_rate: float


@dataclass(frozen=True)
class DraftingSummary:
    """Figures of a run, over all its requests. A round is one verification of one request.

    Attributes:
        num_tokens: tokens gained by the rounds; the first token of a request comes from its prefill and is not counted.
        num_rounds: verifications, requests counted separately.
        num_draft_tokens, num_accepted_tokens: over all rounds.
        acceptance_length: tokens per round, 1 at least.
        acceptance_by_position: share of all rounds that accepted the draft at each position.
        conditional_acceptance_by_position: the same among the rounds that drafted there and accepted all drafts before.
        num_asked_by_position: how many rounds these were.
        histogram: rounds by number of accepted drafts.
        num_denoiser_passes: requests counted separately (NFE).
        tokens_per_denoiser_pass: tokens per NFE; None without passes.
        num_context_passes: of the context tower, for drafting, requests counted separately.
        context_passes_per_token: these per token.
        extend_s, denoise_s, verify_s: seconds of the context tower, the denoiser, and the target.
        calibration: by confidence of the drafts.
    """

    num_tokens: int
    num_rounds: int
    num_draft_tokens: int
    num_accepted_tokens: int
    acceptance_length: float
    acceptance_by_position: list[float]
    conditional_acceptance_by_position: list[float]
    num_asked_by_position: list[int]
    histogram: list[int]
    num_denoiser_passes: int
    tokens_per_denoiser_pass: float | None
    num_context_passes: int
    context_passes_per_token: float
    extend_s: float
    denoise_s: float
    verify_s: float
    calibration: list[CalibrationBin]

    def to_json(self) -> dict[str, Any]:
        """Gives all figures as a JSON object."""
        return asdict(self)


@dataclass
class DraftingMetrics:
    """Counts rounds; `summary` gives the figures."""

    num_tokens: int = 0
    num_denoiser_passes: int = 0
    num_context_passes: int = 0
    extend_s: float = 0.0
    denoise_s: float = 0.0
    verify_s: float = 0.0
    _drafted: list[int] = field(default_factory=list)
    _accepted: list[int] = field(default_factory=list)
    _confidence: list[float] = field(default_factory=list)
    _agreed: list[bool] = field(default_factory=list)

    def add_round(
        self,
        num_draft_tokens: int,
        num_accepted: int,
        num_tokens: int,
        confidence: Sequence[float],
        num_denoiser_passes: int,
        num_context_passes: int,
    ) -> None:
        """Counts one verification of one request.

        Args:
            num_draft_tokens: drafts that were verified.
            num_accepted: drafts that were kept by the rule.
            num_tokens: tokens that the request gained; fewer than accepted + 1 where it ended.
            confidence: of the drafts.
            num_denoiser_passes: that made them.
            num_context_passes: of the context tower for them.
        """
        self.num_tokens += num_tokens
        self.num_denoiser_passes += num_denoiser_passes
        self.num_context_passes += num_context_passes
        self._drafted.append(num_draft_tokens)
        self._accepted.append(num_accepted)
        decided = min(num_accepted + 1, num_draft_tokens)
        self._confidence.extend(confidence[:decided])
        self._agreed.extend(i < num_accepted for i in range(decided))

    def summary(self) -> DraftingSummary:
        """The figures so far."""
        drafted, accepted = np.array(self._drafted, dtype=int), np.array(self._accepted, dtype=int)
        positions = range(int(drafted.max(initial=0)))
        at = [int((accepted > i).sum()) for i in positions]
        asked = [int(((drafted > i) & (accepted >= i)).sum()) for i in positions]
        rounds = len(drafted)
        return DraftingSummary(
            num_tokens=self.num_tokens,
            num_rounds=rounds,
            num_draft_tokens=int(drafted.sum()),
            num_accepted_tokens=int(accepted.sum()),
            acceptance_length=self.num_tokens / rounds if rounds else 1.0,
            acceptance_by_position=[count / rounds for count in at],
            conditional_acceptance_by_position=[count / max(n, 1) for count, n in zip(at, asked, strict=True)],
            num_asked_by_position=asked,
            histogram=np.bincount(accepted, minlength=len(positions) + 1).tolist() if rounds else [],
            num_denoiser_passes=self.num_denoiser_passes,
            tokens_per_denoiser_pass=self.num_tokens / self.num_denoiser_passes if self.num_denoiser_passes else None,
            num_context_passes=self.num_context_passes,
            context_passes_per_token=self.num_context_passes / self.num_tokens if self.num_tokens else 0.0,
            extend_s=self.extend_s,
            denoise_s=self.denoise_s,
            verify_s=self.verify_s,
            calibration=self._calibration(),
        )

    def _calibration(self) -> list[CalibrationBin]:
        confidence, agreed = np.array(self._confidence), np.array(self._agreed, dtype=bool)
        place = bins_of(confidence)
        bins = []
        for i, (low, high) in enumerate(CALIBRATION_BINS):
            inside = place == i
            count = int(inside.sum())
            bins.append(
                CalibrationBin(
                    low=low,
                    high=high,
                    num_drafts=count,
                    mean_confidence=float(confidence[inside].mean()) if count else 0.0,
                    acceptance_rate=float(agreed[inside].mean()) if count else 0.0,
                )
            )
        return bins
