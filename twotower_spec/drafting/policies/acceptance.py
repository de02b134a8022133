"""Chances that drafts are accepted: of a request before its block is denoised, and of a block by its confidence.

A text meets rejections at a rate per position: the chance that the first n drafts of a block are accepted is

    exp(-k (h1 + .. + hn))

with the hazard h of each position, a property of the drafter, and a factor k of the text: 1 is usual, more is hard to
draft for (proportional hazards with a frailty, of survival analysis). Factors come from a mixture of two gamma
distributions of shape a and mean m: most are `ALIKE` the factor K of all requests lately, some are like no other. A
request with R rejections over hazards that sum up to E has, of each,

    k = (a + R) / (a / m + E)        K = R' / E'

weighed by how likely it makes R. R' and E' count all requests, each the less the more was seen of it (a / (a + R)):
one hard text does not make the next one hard. They are bounded by E' = `MOST_EVIDENCE`, and fade together in rounds in
which nothing is seen, down to `LEAST_EVIDENCE`: the factor stays, and gives way the sooner to what is seen then.

Rejections are drafts that were not accepted, or not worth verifying by their confidence; and tokens of the verifier
that the context tower, reading them late, would not have picked: a block of one position, with a hazard of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[np.float64]

# Upper ends of the bins that confidences are calibrated in, and numbers of steps that are told apart.
CALIBRATION_EDGES = np.array([0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])
MOST_STEPS_APART = 4
# What is expected before anything is known counts as so many observations.
PRIOR_WEIGHT = 4.0
# The same for what is expected of a block size, which is what the others show.
SIZES_ALIKE = 40.0
# Hazard of a first draft of usual text: accepted four times in five, as on the trio's Python: drafting is tried.
FIRST_HAZARD = 0.22
# Shapes of the distributions of factors, of requests that are like those that are served at about the same time and of
# others, and the share of these. On the trio the factors of texts of one kind differ by half, of kinds by six times.
ALIKE, UNLIKE, SHARE_UNLIKE = 4.0, 0.5, 0.1
# What is remembered from one block or round to the next: about twenty of them count.
MEMORY = 0.95
# What holds for long is the mean of so many.
MOST_COUNTED = 200
# Bounds of what is remembered of all, in hazards: the rejections that usual text meets over it.
LEAST_EVIDENCE, MOST_EVIDENCE = 0.5, 12.0
# Stands for a block size: tokens that were read late.
READING = 0
MOST_EXPONENT = 700.0
# A text of ten thousand tokens without a rejection has no factor of its own any more.
LEAST_FACTOR = 1e-3


@dataclass
class _Record:
    """Rejections of a request, the hazard over which they came, and tokens so far."""

    rejections: float = 0.0
    hazard: float = 0.0
    num_tokens: int = 0

    def add(self, rejections: float, hazard: float, memory: float = 1.0) -> None:
        self.rejections, self.hazard = memory * self.rejections + rejections, memory * self.hazard + hazard

    def under(self, shape: float, mean: float) -> tuple[float, float]:
        """Posterior mean of the factor under a gamma distribution, and the logarithm of the record's likelihood."""
        rate, rejections = shape / mean, shape + self.rejections
        likelihood = math.lgamma(rejections) - math.lgamma(shape)
        likelihood += shape * math.log(rate) - rejections * math.log(rate + self.hazard)
        return rejections / (rate + self.hazard), likelihood


class Acceptance:
    """Chances of drafts by request and block size."""

    def __init__(self, block_sizes: Sequence[int]) -> None:
        """Begins with what is expected of any text."""
        longest = max(block_sizes)
        self._rejections = {size: np.zeros(longest) for size in (READING, *block_sizes)}
        self._exposure = {size: np.zeros(longest) for size in (READING, *block_sizes)}
        self._recent = _Record(LEAST_EVIDENCE, LEAST_EVIDENCE)
        self._own: dict[Hashable, _Record] = {}
        self._hazards: dict[int, Array] = {}
        # Tokens of the requests that are here, and the mean of those that have ended, over so many.
        self._num_tokens, self._ended_tokens, self._num_ended = 0, 0.0, 0
        self.num_observed, self._has_seen = 0, False
        self._num_blocks: dict[int, int] = defaultdict(int)

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of a request; of those that go on as far as they have come."""
        total = self._num_tokens + self._num_ended * self._ended_tokens
        return total / max(1, len(self._own) + self._num_ended)

    def __contains__(self, request_id: Hashable) -> bool:
        return request_id in self._own

    def num_tokens(self, request_id: Hashable) -> int:
        """Tokens that a request has brought."""
        own = self._own.get(request_id)
        return own.num_tokens if own else 0

    def is_known(self, request_id: Hashable) -> bool:
        """Whether anything was seen of a request."""
        own = self._own.get(request_id)
        return own is not None and own.hazard > 0

    def is_new(self, block_size: int) -> bool:
        """Whether no more blocks of a size were verified than what is expected of it counts for."""
        return self._num_blocks[block_size] < PRIOR_WEIGHT

    def factor(self, request_id: Hashable) -> float:
        """How hard a request is to draft for, 1 being usual in the long run."""
        usual = max(self._recent.rejections / self._recent.hazard, LEAST_FACTOR)
        own = self._own.get(request_id)
        if own is None or not own.hazard:
            return usual
        alike, if_alike = own.under(ALIKE, usual)
        unlike, if_unlike = own.under(UNLIKE, 1.0)
        share = SHARE_UNLIKE / (SHARE_UNLIKE + (1 - SHARE_UNLIKE) * math.exp(min(if_alike - if_unlike, MOST_EXPONENT)))
        return share * unlike + (1 - share) * alike

    def survival(self, request_ids: Iterable[Hashable], block_size: int) -> Array:
        """Chance [num_reqs, block_size] that all drafts of a request up to each position are accepted."""
        factors = np.array([self.factor(request_id) for request_id in request_ids])
        survival: Array = np.exp(-factors[:, None] * np.cumsum(self.hazards(block_size)))
        return survival

    def hazards(self, block_size: int) -> Array:
        """Hazard [block_size] of each position; what is not known of a block size is as in the others.

        In units of that of first positions, which stays what it was at first: factors say what it is now.
        """
        if block_size not in self._hazards:
            blocks = [size for size in self._rejections if size != READING]
            rejections = np.sum([self._rejections[size] for size in blocks], axis=0)
            exposure = np.sum([self._exposure[size] for size in blocks], axis=0)
            usual = (rejections + PRIOR_WEIGHT * FIRST_HAZARD) / (exposure + PRIOR_WEIGHT)
            own = self._rejections[block_size] + SIZES_ALIKE * usual
            hazards = (own / (self._exposure[block_size] + SIZES_ALIKE))[: max(block_size, 1)]
            self._hazards[block_size] = hazards * (FIRST_HAZARD / usual[0])
        return self._hazards[block_size]

    def begin(self, request_ids: Iterable[Hashable]) -> None:
        """Takes in requests that are new; of others nothing is remembered."""
        for request_id in request_ids:
            if request_id not in self._own:
                self._own[request_id] = _Record()

    def end_rounds(self, request_ids: Sequence[Hashable], num_new: Sequence[int], num_rounds: int) -> None:
        """Counts the tokens of every request, and lets what was seen of all fade.

        Args:
            request_ids: of the rounds.
            num_new: tokens that each has got in them.
            num_rounds: that are over.
        """
        for request_id, count in zip(request_ids, num_new, strict=True):
            if (own := self._own.get(request_id)) is not None:
                own.num_tokens += count
                self._num_tokens += count
        if not self._has_seen:
            fading = max(MEMORY**num_rounds, min(1.0, LEAST_EVIDENCE / self._recent.hazard))
            self._recent.add(0.0, 0.0, fading)
        self._has_seen = False

    def forget(self, request_id: Hashable) -> None:
        """Forgets a request that has ended, but for its length; unknown ids are ignored."""
        own = self._own.pop(request_id, None)
        if own is not None:
            self._num_tokens -= own.num_tokens
        if own is not None and own.num_tokens:
            self._num_ended = min(self._num_ended + 1, MOST_COUNTED)
            self._ended_tokens += (own.num_tokens - self._ended_tokens) / self._num_ended

    def observe_block(self, request_id: Hashable, block_size: int, num_accepted: int, is_limited: bool) -> None:
        """Learns from a block.

        Args:
            request_id: whose.
            block_size: positions that were denoised.
            num_accepted: drafts that were kept.
            is_limited: all that the request could use was; otherwise the next one was rejected, or not worth verifying.
        """
        self._num_blocks[block_size] += 1
        ended = not is_limited
        decided = num_accepted + ended
        exposure, rejections = np.ones(decided), np.zeros(decided)
        if ended:
            exposure[-1] = self._exposure_before(request_id, block_size, num_accepted)
            rejections[-1] = 1.0
        self._observe(request_id, block_size, rejections, exposure)

    def observe_reading(self, request_id: Hashable, foreseen: Sequence[bool]) -> None:
        """Learns from tokens that the context tower has read late: whether it would have picked each of them."""
        foreseen = foreseen[max(0, len(foreseen) - self.num_tokens(request_id)) :]  # those before are the prompt's
        if len(foreseen):
            rejections = float(len(foreseen) - sum(foreseen))
            exposure = len(foreseen) - rejections * (1 - self._exposure_before(request_id, READING, 0))
            self._observe(request_id, READING, np.array([rejections]), np.array([exposure]))

    def _exposure_before(self, request_id: Hashable, block_size: int, position: int) -> float:
        """Mean place of a rejection within its position, 1 being its end: early where the hazard is high."""
        hazard = self.factor(request_id) * float(self.hazards(block_size)[position])
        return 1 / hazard - 1 / math.expm1(min(hazard, MOST_EXPONENT)) if hazard > 1e-3 else 0.5

    def _observe(self, request_id: Hashable, block_size: int, rejections: Array, exposure: Array) -> None:
        """Learns what the text is from what positions are, and what they are from what the text is."""
        factor = self.factor(request_id)
        num, hazard = float(rejections.sum()), float(exposure @ self.hazards(block_size)[: len(exposure)])
        own, recent = self._own.get(request_id, _Record()), self._recent
        share = ALIKE / (ALIKE + own.rejections)
        own.add(num, hazard, MEMORY)
        recent.add(share * num, share * hazard)
        recent.add(0.0, 0.0, min(1.0, MOST_EVIDENCE / recent.hazard))
        self._has_seen = True
        if block_size == READING:  # after a change the factor before it is of another text
            factor = self.factor(request_id)
        for counts, seen in (self._exposure, factor * exposure), (self._rejections, rejections):
            counts[block_size] *= 1 - 1 / MOST_COUNTED
            counts[block_size][: len(seen)] += seen
        self._hazards.clear()
        self.num_observed += 1


class Calibration:
    """Shares of drafts of every confidence that were accepted, per block size.

    Attributes:
        trials, accepted: float64 [number of steps, position, bin of confidence], by block size.
    """

    def __init__(self, block_sizes: Sequence[int]) -> None:
        """Takes a confidence for what it says until it is known better."""
        shape = (MOST_STEPS_APART, max(block_sizes), len(CALIBRATION_EDGES) + 1)
        self.trials: dict[int, Array] = defaultdict(lambda: np.zeros(shape))
        self.accepted: dict[int, Array] = defaultdict(lambda: np.zeros(shape))

    def survival(self, block_size: int, num_steps: Sequence[int], confidence: Tensor) -> Array:
        """Calibrated chance [num_reqs, num_tokens] that all drafts up to each position are accepted."""
        raw = confidence.double().cpu().numpy()
        bins = np.searchsorted(CALIBRATION_EDGES, raw)
        steps = np.array([_steps_class(n) for n in num_steps])[:, None]
        at = steps, np.arange(raw.shape[1]), bins
        trials, accepted = self.trials[block_size][at], self.accepted[block_size][at]
        survival: Array = np.cumprod((accepted + PRIOR_WEIGHT * raw) / (trials + PRIOR_WEIGHT), axis=1)
        return survival

    def first(self, block_size: int, confidence: Array) -> Array:
        """Calibrated chance [num_reqs] of first drafts, by the context tower's confidence in them."""
        bins = np.searchsorted(CALIBRATION_EDGES, confidence)
        trials = self.trials[block_size][:, 0, bins].sum(axis=0)
        accepted = self.accepted[block_size][:, 0, bins].sum(axis=0)
        chance: Array = (accepted + PRIOR_WEIGHT * confidence) / (trials + PRIOR_WEIGHT)
        return chance

    def observe(self, block_size: int, num_steps: int, confidence: Array, num_drafts: int, num_accepted: int) -> None:
        """Counts the drafts of a block up to the first that was rejected."""
        bins = np.searchsorted(CALIBRATION_EDGES, confidence)
        for position in range(min(num_drafts, num_accepted + 1)):
            at = (_steps_class(num_steps), position, bins[position])
            for counts, seen in (self.trials, 1), (self.accepted, position < num_accepted):
                counts[block_size][at] = (1 - 1 / MOST_COUNTED) * counts[block_size][at] + seen


def _steps_class(num_steps: int) -> int:
    """Index of a number of steps in the calibration."""
    return min(max(num_steps, 1), MOST_STEPS_APART) - 1
