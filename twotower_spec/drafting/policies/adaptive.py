"""The policy that measures while it serves: what a step costs, what a confidence is worth, which block pays."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower_kernels.unmasking import choose_commits
from twotower_spec.config import check_integer, check_schedule
from twotower_spec.drafting.policies.policy import DraftPlan, RoundOutcome
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising import DenoisingStep

Array = npt.NDArray[np.float64]

# Upper ends of the bins that confidences are calibrated in.
CALIBRATION_EDGES = np.array([0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])
# Calibration counts its own confidence as this many observations.
PRIOR_WEIGHT = 4.0
# Numbers of steps that are told apart in calibration.
MOST_STEPS_APART = 4
# Rounds are forgotten at this rate: what a few hundred rounds ago was measured hardly counts.
MEMORY = 0.998
# What block sizes bring is forgotten sooner: one that was slow for a while, or while vLLM started, is tried again.
ARM_MEMORY = 0.99
COST_MEMORY = 0.9
# Rounds that every block size gets before any is preferred, and how many standard errors doubt is worth after that.
FIRST_ROUNDS = 4
OPTIMISM = 1.5
SHORTEST_ROUND = 1e-9
# Times are means over so many rounds; one that took this many times the median is left out: something else went on.
RECENT_ROUNDS = 64
LONGEST_ROUND = 3.0
# The same for verifications, whose numbers of tokens differ widely.
LONGEST_VERIFICATION = 30.0
# Another step is tried this often before its gain is believed, and then in this share of rounds.
FIRST_CONTINUATIONS = 5
CONTINUE_ANYWAY = 1 / 100
# Values before a step are told apart in classes of this width, in tokens.
VALUE_CLASS = 0.75


@dataclass
class _Arm:
    """Tokens and seconds that one block size has brought; older rounds count less."""

    rounds: float = 0.0
    tokens: float = 0.0
    squares: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_ROUNDS))

    def fade(self) -> None:
        """A round has gone by: what was measured before counts less, and doubt about it grows."""
        self.rounds, self.tokens, self.squares = (x * ARM_MEMORY for x in (self.rounds, self.tokens, self.squares))

    def add(self, tokens: float, seconds: float) -> None:
        """Counts a round."""
        if self.rounds < 1:  # what is known is old, and less than this round
            self.recent.clear()
        self.rounds, self.tokens, self.squares = self.rounds + 1, self.tokens + tokens, self.squares + tokens * tokens
        self.recent.append(seconds)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        usual = statistics.median(self.recent)
        seconds = statistics.fmean(s for s in self.recent if s <= LONGEST_ROUND * usual)
        return self.tokens / self.rounds / max(seconds, SHORTEST_ROUND)

    @property
    def optimistic_rate(self) -> float:
        """The rate if luck was against it: too few rounds, or rounds too unlike, to know it better."""
        mean = self.tokens / self.rounds
        # However alike the rounds were, the text may have changed since: at least a token of doubt.
        deviation = max(1.0, math.sqrt(max(0.0, self.squares / self.rounds - mean * mean)))
        return self.rate * (1 + OPTIMISM * deviation / math.sqrt(self.rounds) / max(mean, 1.0))


@dataclass
class _Reading:
    """Seconds of the context tower that are shared out over all rounds, and the tokens that these gained."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens, self.seconds = MEMORY * self.tokens + tokens, MEMORY * self.seconds + seconds

    @property
    def price(self) -> float:
        """Seconds per token."""
        return self.seconds / max(self.tokens, 1.0)


@dataclass
class _Line:
    """Seconds of a verification as a line over its tokens, with older ones counting less."""

    sums: Array = field(default_factory=lambda: np.zeros(5))
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_ROUNDS))

    def add(self, tokens: float, seconds: float) -> None:
        """Counts a verification, unless something else held it up."""
        self.recent.append(seconds)
        if seconds <= LONGEST_VERIFICATION * statistics.median(self.recent):
            self.sums = self.sums * MEMORY + np.array([1.0, tokens, seconds, tokens * tokens, tokens * seconds])

    @property
    def slope(self) -> float:
        """Seconds per token, 0 where not known."""
        count, x, y, xx, xy = self.sums.tolist()
        spread = count * xx - x * x
        return max(0.0, (count * xy - x * y) / spread) if spread > 1e-6 * max(1.0, count * xx) else 0.0


@dataclass
class _Gain:
    """Mean value that another step has added to blocks."""

    count: int = 0
    mean: float = 0.0

    def add(self, gain: float) -> None:
        self.count += 1
        self.mean += (gain - self.mean) / min(self.count, 200)


@dataclass
class _Load:
    """Measurements of batches of about one size."""

    arms: dict[int, _Arm] = field(default_factory=lambda: defaultdict(_Arm))
    num_rounds: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    step_seconds: dict[int, float] = field(default_factory=dict)
    verification: _Line = field(default_factory=_Line)

    @property
    def rate(self) -> float:
        """Tokens per second of the best block size known; 0 before the first round."""
        return max((arm.rate for arm in self.arms.values() if arm.recent), default=0.0)


class AdaptivePolicy:
    """Stops when another step is worth less than verifying now, and drafts no more than is worth verifying.

    Three decisions, all from what was measured while serving, per size of batch: the block size (none at all where
    drafting does not pay, tried again at times), by tokens per second; after every denoiser pass, whether one more is
    worth its time; and how many drafts are worth their share of the verification. Confidences are calibrated online,
    per block size, number of steps, and position. Use it when load, text or verifier vary, or nobody wants to tune.

    Args:
        block_sizes: that may be denoised.
        most_steps: of a block.
        confidence_threshold: what is above it is committed before the last step.
        may_skip: whether a round may draft nothing.
        seed: of the private generator that decides what is tried.

    Raises:
        ArgumentError: a value is out of range.
    """

    def __init__(
        self,
        block_sizes: Sequence[int] = (4, 8, 16),
        most_steps: int = 16,
        confidence_threshold: float = 0.8,
        may_skip: bool = True,
        seed: int = 0,
    ) -> None:
        if not block_sizes:
            raise ArgumentError("block_sizes is empty; give at least one, [8] for instance")
        for size in block_sizes:
            check_schedule(size, most_steps, confidence_threshold)
        check_integer("most_steps", most_steps, minimum=1)
        self.block_sizes, self.most_steps, self.threshold = tuple(block_sizes), most_steps, confidence_threshold
        self.num_speculative_tokens = max(block_sizes)
        self.selects_drafts = True
        self.random = Random(seed)
        # Without drafts first: two lengths of verification tell what a token of it costs.
        self._choices = (0, *self.block_sizes) if may_skip else self.block_sizes
        self._loads: dict[int, _Load] = defaultdict(_Load)
        self._reading = _Reading()
        self._gains: dict[tuple[int, int, int], _Gain] = defaultdict(_Gain)
        bins = len(CALIBRATION_EDGES) + 1
        shape = (MOST_STEPS_APART, self.num_speculative_tokens, bins)
        self._trials = {size: np.zeros(shape) for size in self.block_sizes}
        self._accepted = {size: np.zeros(shape) for size in self.block_sizes}

    def plan(self, num_reqs: int) -> DraftPlan | None:
        """See `DraftPolicy.plan`."""
        load = self._loads[load_class(num_reqs)]
        new = [size for size in self._choices if load.num_rounds[size] < (FIRST_ROUNDS if size else 2)]
        size = new[0] if new else max(self._choices, key=lambda size: load.arms[size].optimistic_rate)
        return DraftPlan(size, size, _AdaptiveSteps(self, load, size)) if size else None

    def usable(self, plan: DraftPlan, confidence: Tensor, num_denoiser_passes: Sequence[int]) -> list[int]:
        """See `DraftPolicy.usable`."""
        rule = plan.commit_rule
        assert isinstance(rule, _AdaptiveSteps)
        survival = self.survival(plan.block_size, num_denoiser_passes, confidence)
        worth = survival > rule.token_price
        worth[:, 0] = True  # a round that was denoised drafts something, or it could never learn
        counts: list[int] = np.where(worth.all(axis=1), worth.shape[1], worth.argmin(axis=1)).tolist()
        return counts

    def observe(self, outcome: RoundOutcome) -> None:
        """See `DraftPolicy.observe`."""
        num_reqs = len(outcome.num_accepted)
        if not num_reqs:
            return
        load = self._loads[load_class(outcome.num_planned or num_reqs)]
        size = outcome.plan.block_size if outcome.plan else 0
        gained = sum(outcome.num_accepted) + num_reqs
        seconds = self._seconds(outcome, gained)
        load.num_rounds[size] += 1
        for arm in load.arms.values():
            arm.fade()
        if load.num_rounds[size] > 1:  # the first one pays for whatever is made once
            load.arms[size].add(gained, seconds)
        if not outcome.with_prompts:
            load.verification.add(sum(outcome.num_draft_tokens) + num_reqs, outcome.verify_s)
        passes = max(outcome.num_denoiser_passes, default=0)
        if passes:
            measured = outcome.denoise_s / passes
            known = load.step_seconds.get(size, measured)
            load.step_seconds[size] = COST_MEMORY * known + (1 - COST_MEMORY) * measured
        if any(outcome.num_draft_tokens):
            self._calibrate(size, outcome)

    def _seconds(self, outcome: RoundOutcome, gained: int) -> float:
        """Seconds of a round, with its share of the reading that all rounds pay for."""
        # A context that lags behind, after rounds without drafts or with a new prompt, costs this round more than its
        # own drafts do: the surplus is shared out over all rounds that draft.
        own_share = min(1.0, gained / max(outcome.num_context_tokens, 1))
        self._reading.add(gained, outcome.extend_s * (1 - own_share))
        if outcome.plan is None:
            return outcome.verify_s
        rule = outcome.plan.commit_rule
        tried = rule.num_tried if isinstance(rule, _AdaptiveSteps) else 0
        # A step that was taken to learn is not charged to the block size either.
        denoise_s = outcome.denoise_s * (1 - tried / max(1, *outcome.num_denoiser_passes))
        return outcome.extend_s * own_share + self._reading.price * gained + denoise_s + outcome.verify_s

    def _calibrate(self, size: int, outcome: RoundOutcome) -> None:
        """Counts what became of drafts of every confidence."""
        bins = np.searchsorted(CALIBRATION_EDGES, outcome.confidence.double().numpy())
        for row, (drafted, accepted) in enumerate(zip(outcome.num_draft_tokens, outcome.num_accepted, strict=True)):
            steps = steps_class(outcome.num_denoiser_passes[row])
            for position in range(min(drafted, accepted + 1)):
                at = (steps, position, bins[row, position])
                self._trials[size][at] += 1
                self._accepted[size][at] += position < accepted

    def survival(self, size: int, num_steps: Sequence[int], confidence: Tensor) -> Array:
        """Calibrated probability [num_reqs, num_tokens] that all drafts up to each position are accepted."""
        raw = confidence.double().cpu().numpy()
        bins = np.searchsorted(CALIBRATION_EDGES, raw)
        steps = np.array([steps_class(n) for n in num_steps])[:, None]
        positions = np.arange(raw.shape[1])
        trials, accepted = self._trials[size][steps, positions, bins], self._accepted[size][steps, positions, bins]
        survival: Array = np.cumprod((accepted + PRIOR_WEIGHT * raw) / (trials + PRIOR_WEIGHT), axis=1)
        return survival

    def gain(self, size: int, step: int, value: float) -> _Gain:
        """Looks up what a step after `step` brought blocks of about this value."""
        return self._gains[size, step, int(value / VALUE_CLASS)]

    def tries(self, gains: Sequence[_Gain]) -> bool:
        """Whether to take another step to see what it brings: where that is not known yet, and once in a while."""
        return any(gain.count < FIRST_CONTINUATIONS for gain in gains) or self.random.random() < CONTINUE_ANYWAY


class _AdaptiveSteps:
    """The commit rule of one round: goes on with the rows for which another step is worth its time."""

    def __init__(self, policy: AdaptivePolicy, load: _Load, size: int) -> None:
        self.policy, self.load, self.size = policy, load, size
        self.rate = load.rate
        # In tokens: what verifying one draft more must bring.
        self.token_price = self.rate * load.verification.slope
        # Steps that were taken to learn what they bring: one at most.
        self.num_tried = 0
        self._before: dict[int, float] = {}

    def commits(self, step: DenoisingStep) -> Tensor:
        """See `CommitRule.commits`."""
        policy, rows = self.policy, step.rows
        survival = policy.survival(self.size, [step.index + 1] * len(rows), step.confidence)
        values = np.clip(survival - self.token_price, 0.0, None).sum(axis=1).tolist()
        for row, value in zip(rows, values, strict=True):
            if row in self._before:
                policy.gain(self.size, step.index - 1, self._before[row]).add(value - self._before[row])
        if step.index + 1 >= policy.most_steps:
            return step.masked
        # In tokens: what another step must bring, all rows together, and every row at least its share.
        price = self.rate * self.load.step_seconds.get(self.size, math.inf)
        gains = [policy.gain(self.size, step.index, value) for value in values]
        going_on = [math.isfinite(price) and gain.mean > price / len(rows) for gain in gains]
        if sum(gain.mean for gain, goes in zip(gains, going_on, strict=True) if goes) <= price:
            going_on = [False] * len(rows)
        if math.isfinite(price) and not any(going_on) and not self.num_tried and policy.tries(gains):
            going_on, self.num_tried = [True] * len(rows), 1
        self._before = {row: value for row, value, goes in zip(rows, values, going_on, strict=True) if goes}
        keep = torch.tensor(going_on, device=step.masked.device)
        return torch.where(keep[:, None], self._confident(step), step.masked)

    def _confident(self, step: DenoisingStep) -> Tensor:
        """Commits the picks above the threshold, or the most confident one where there is none."""
        return choose_commits(step.confidence, step.masked, self.policy.threshold, step.masked.shape[1])


def load_class(num_reqs: int) -> int:
    """Groups batches of about one size, by powers of two."""
    return max(num_reqs, 1).bit_length()


def steps_class(num_steps: int) -> int:
    """Index of a number of steps in the calibration."""
    return min(max(num_steps, 1), MOST_STEPS_APART) - 1
