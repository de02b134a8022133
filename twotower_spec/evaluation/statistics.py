"""Means with intervals over prompts, repeated runs, and comparisons that know the noise they were measured in."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from twotower_spec.errors import ArgumentError
from twotower_spec.extras import require_extra

CONFIDENCE_LEVEL = 0.95
NUM_RESAMPLES = 1000
FEWEST_ROUNDS = 3
# With fewer, the interval of a median over rounds reaches from the lowest to the highest and covers less.
FEWEST_FOR_INTERVAL = 5

Verdict = Literal["faster", "slower", "no difference"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with doubt.

    Attributes:
        value: the best guess.
        low, high: ends of its interval, or quartiles of runs, as its maker says; both are the value where nothing is
            known of its doubt, as of one measurement.
    """

    value: float
    low: float
    high: float

    @property
    def has_width(self) -> bool:
        """Whether there is more than one number."""
        return self.low < self.high

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def bootstrap_interval(
    values: Sequence[float],
    denominators: Sequence[float] | None = None,
    *,
    confidence_level: float = CONFIDENCE_LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of values, or ratio of two sums, over prompts.

    Prompts are what is drawn again: the tokens of one prompt depend on each other, so an interval over verify steps
    or tokens would be too narrow. The percentile method is used: BCa covered no better for ratios like acceptance
    lengths (both 94 % at 72 prompts, 91 and 92 % at 24, both 86 % at 8: few prompts give intervals that are too narrow)
    and is undefined where all values are equal.

    Args:
        values: one per prompt; as tokens for an acceptance length.
        denominators: one per prompt and above 0, as verify steps: the estimate is then sum(values) /
            sum(denominators), in which long prompts weigh more. Without it: the mean of the values.
        confidence_level: in (0, 1).
        num_resamples: at least 1.
        seed: of the resampling; equal inputs give equal intervals.

    Raises:
        ArgumentError: no values, other numbers of values and denominators, a value that is not finite, a denominator
            not above 0, or a setting outside its range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; scipy.stats.bootstrap.
    """
    tokens = _finite(values, "values")
    steps = np.ones_like(tokens) if denominators is None else _finite(denominators, "denominators")
    if len(tokens) != len(steps):
        raise ArgumentError(f"{len(tokens)} values came with {len(steps)} denominators; give one pair per prompt")
    if steps.min() <= 0:
        raise ArgumentError(f"denominator {steps.min():g} is not above 0; leave out prompts without a step")
    return _bootstrap((tokens, steps), _ratio_of_sums, confidence_level, num_resamples, seed)


def median_and_spread(runs: Sequence[float]) -> Estimate:
    """Median and quartiles of repeated runs: one disturbed run moves neither much.

    Args:
        runs: at least one, in any unit.

    Raises:
        ArgumentError: no runs, or one that is not finite.
    """
    low, median, high = np.quantile(_finite(runs, "runs"), [0.25, 0.5, 0.75]).tolist()
    return Estimate(median, low, high)


@dataclass(frozen=True)
class Comparison:
    """A candidate against a baseline, next to the baseline against itself (A/A).

    Run all three in every round, baseline, candidate and baseline again, and begin with another of them in each
    round: what changes slowly (heat, other users) then meets all alike. The estimate is the median over rounds of the
    ratio within a round; the noise floor is what the same estimate may reach where nothing differs, the further end
    of the A/A interval. With 2 % of jitter, 8 % of runs disturbed by up to 60 % and equal systems, 1 % of the
    comparisons of 5 to 20 rounds were wrongly called a difference, 4 % with 3.

    Both intervals are 95 % bootstrap intervals of a median, which up to 5 rounds reach from the lowest to the highest
    ratio: they cover 75 % with 3 rounds, 88 % with 4, 94 % with 5. `interval_name` says what to call them.

    Attributes:
        speed_up: baseline's time over the candidate's: above 1 the candidate is faster.
        noise_floor: factor at least 1; a speed-up between its inverse and it cannot be told from noise.
        num_rounds: how many were measured.
    """

    speed_up: Estimate
    noise_floor: float
    num_rounds: int

    @classmethod
    def of_rates(
        cls,
        baseline: Sequence[float],
        candidate: Sequence[float],
        baseline_again: Sequence[float],
        *,
        num_resamples: int = NUM_RESAMPLES,
        seed: int = 0,
        sign: Literal[1, -1] = 1,
    ) -> Self:
        """Compares rates such as tokens per second, where more is better.

        Args:
            baseline, candidate, baseline_again: above 0, one per round and in the order of the rounds, at least 3;
                5 or more for differences that are not several times the noise.
            num_resamples: at least 1.
            seed: of the resampling.
            sign: -1 where less is better.

        Raises:
            ArgumentError: too few rounds, different numbers of them, or a number that is not above 0.
        """
        first, other, again = (sign * one for one in _logarithms(baseline, candidate, baseline_again))
        gain, noise = (
            _bootstrap((one - first,), np.median, CONFIDENCE_LEVEL, num_resamples, seed) for one in (other, again)
        )
        speed_up = Estimate(*np.exp([gain.value, gain.low, gain.high]).tolist())
        return cls(speed_up, float(np.exp(max(-noise.low, noise.high))), len(first))

    @classmethod
    def of_seconds(
        cls,
        baseline: Sequence[float],
        candidate: Sequence[float],
        baseline_again: Sequence[float],
        *,
        num_resamples: int = NUM_RESAMPLES,
        seed: int = 0,
    ) -> Self:
        """Compares times, where less is better; else as `of_rates`."""
        return cls.of_rates(baseline, candidate, baseline_again, num_resamples=num_resamples, seed=seed, sign=-1)

    @property
    def verdict(self) -> Verdict:
        """A difference only where the speed-up is outside the noise floor and its interval does not contain 1."""
        if self.speed_up.low > 1 and self.speed_up.value > self.noise_floor:
            return "faster"
        if self.speed_up.high < 1 and self.speed_up.value < 1 / self.noise_floor:
            return "slower"
        return "no difference"

    @property
    def interval_name(self) -> str:
        """Name of the interval around the speed-up."""
        return "95 % interval" if self.num_rounds >= FEWEST_FOR_INTERVAL else "lowest to highest"

    def to_json(self) -> dict[str, Any]:
        """Gives JSON with the verdict and what the interval is."""
        return {**asdict(self), "verdict": self.verdict, "interval_name": self.interval_name}

    def __str__(self) -> str:
        ratio = self.speed_up
        ends = f"{self.interval_name} {ratio.low:.2f}x to {ratio.high:.2f}x"
        rounds = f"A/A noise {self.noise_floor:.2f}x, {self.num_rounds} rounds"
        return f"{self.verdict}: {ratio.value:.2f}x ({ends}; {rounds})"


def compare_same_repeats(
    baseline: Mapping[int, float], candidate: Mapping[int, float], baseline_again: Mapping[int, float]
) -> Comparison | None:
    """Compares rates repeat by repeat: a run that was stopped may have more of one than of the other.

    Args:
        baseline, candidate, baseline_again: rates, where more is better, by number of the repeat. Repeats that one of
            them lacks, or in which one has no speed (0), are left out.

    Returns:
        None where fewer than three are left.
    """
    rounds = _same_repeats(baseline, candidate, baseline_again)
    return Comparison.of_rates(*zip(*rounds, strict=True)) if len(rounds) >= FEWEST_ROUNDS else None


def ratio_of_same_repeats(candidate: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """Takes the median over repeats of the ratio of two rates; None where no repeat is left to compare."""
    ratios = [own / other for own, other in _same_repeats(candidate, baseline)]
    return statistics.median(ratios) if ratios else None


def _same_repeats(*systems: Mapping[int, float]) -> list[tuple[float, ...]]:
    """Rates of all systems, by repeat."""
    common = set(systems[0]).intersection(*systems[1:])
    rates = (tuple(one[repeat] for one in systems) for repeat in sorted(common))
    return [one for one in rates if all(one)]


def _finite(values: Sequence[float], name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ArgumentError(f"{name} of shape {list(array.shape)} cannot be summarised; give at least one number")
    if not np.isfinite(array).all():
        raise ArgumentError(f"{name} hold {array[~np.isfinite(array)][0]}; leave out runs and prompts that failed")
    return array


def _logarithms(*systems: Sequence[float]) -> tuple[Floats, Floats, Floats]:
    """Logarithms of what the baseline, the candidate and the baseline again took in the same rounds."""
    found = []
    for name, runs in zip(("baseline", "candidate", "baseline_again"), systems, strict=True):
        array = _finite(runs, name)
        if array.min() <= 0:
            raise ArgumentError(f"{name} holds {array.min():g}; times and rates are above 0, leave out failed runs")
        found.append(np.log(array))
    first, other, again = found
    if not len(first) == len(other) == len(again):
        raise ArgumentError(
            f"{len(first)} runs of the baseline, {len(other)} of the candidate and {len(again)} of the baseline again "
            f"are no rounds; run each once per round"
        )
    if len(first) < FEWEST_ROUNDS:
        raise ArgumentError(f"{len(first)} rounds cannot tell a difference from noise; use at least {FEWEST_ROUNDS}")
    return first, other, again


def _ratio_of_sums(values: Floats, denominators: Floats, axis: int = -1) -> Floats:
    ratio: Floats = values.sum(axis) / denominators.sum(axis)
    return ratio


def _bootstrap(
    samples: tuple[Floats, ...], statistic: Any, confidence_level: float, num_resamples: int, seed: int
) -> Estimate:
    """Percentile interval of a statistic; samples of several arrays are drawn together, position by position."""
    require_extra("bench", "scipy")
    from scipy.stats import bootstrap  # a second of import

    if not 0 < confidence_level < 1:
        raise ArgumentError(f"confidence_level {confidence_level} is not between 0 and 1; use 0.95 for 95 %")
    if num_resamples < 1:
        raise ArgumentError(f"num_resamples {num_resamples} is below 1; use {NUM_RESAMPLES}")
    estimate = float(statistic(*samples, axis=-1))
    if len(samples[0]) == 1:
        return Estimate(estimate, estimate, estimate)
    ends = bootstrap(
        samples,
        statistic,
        paired=True,
        confidence_level=confidence_level,
        method="percentile",
        n_resamples=num_resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(estimate, float(ends.low), float(ends.high))
