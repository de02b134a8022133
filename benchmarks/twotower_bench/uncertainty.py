"""Numbers that are not quite known, and times between those that were measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from twotower_bench.serving_profile import Estimate
from twotower_spec.config import check_integer
from twotower_spec.errors import ArgumentError

# A number with its doubt: [1 + num_draws], the value itself first, then what it may be.
Draws = npt.NDArray[np.float64]

# Standard deviations from the middle to the end of a 95 % interval.
Z95 = 1.959964


class Doubt:
    """Turns numbers into draws of what they may be, from a private generator.

    A value with an interval is drawn from two half normal distributions around it, whose 2.5 % tails end the interval;
    one without is taken to be within `assumed_error` of the truth, 95 times in 100.
    """

    def __init__(self, assumed_error: float = 0.1, num_draws: int = 4000, seed: int = 0) -> None:
        """Begins.

        Raises:
            ArgumentError: a number is out of range.
        """
        check_integer("num_draws", num_draws, minimum=100)
        if not 0 <= assumed_error < 1:
            raise ArgumentError(f"assumed_error {assumed_error} is not allowed; give a share from 0 to below 1")
        self.assumed_error, self.num_draws = assumed_error, num_draws
        self._random = np.random.default_rng(seed)

    def draws(self, estimate: Estimate, low: float = 0.0, high: float = np.inf) -> Draws:
        """Draws [1 + num_draws] of a number that is known to be from `low` to `high`."""
        value = estimate.value
        below = value - estimate.low if estimate.low is not None else value * self.assumed_error
        above = estimate.high - value if estimate.high is not None else value * self.assumed_error
        z = np.concatenate([[0.0], self._random.standard_normal(self.num_draws)])
        floor = max(low, 1e-3 * value)  # a time is never 0, whatever its interval says
        drawn: Draws = np.clip(value + z / Z95 * np.where(z < 0, below, above), floor, high)
        return drawn


def summary(draws: Draws) -> Estimate:
    """The value and the middle 95 % of the draws."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    value = float(draws[0])
    # A value at an end of what is possible may lie outside by rounding.
    return Estimate(value, min(float(low), value), max(float(high), value))


class Grid:
    """Times by batch size and one more number, straight lines in between, nothing beyond."""

    def __init__(self, what: str, axis: str, times: Mapping[tuple[int, int], Draws]) -> None:
        """Keeps them.

        Args:
            what: is timed, for errors.
            axis: name of the second number.
            times: by batch size and that number.
        """
        self.what, self.axis = what, axis
        self.rows: dict[int, dict[int, Draws]] = {}
        for (batch_size, x), draws in times.items():
            self.rows.setdefault(batch_size, {})[x] = draws

    def at(self, batch_size: float, x: float) -> Draws:
        """The time there.

        A batch size without times on both sides of the second number is passed over: batches that ran empty have been
        seen at some sizes with some numbers of drafts alone.

        Raises:
            ArgumentError: it is outside what was given; nothing is extrapolated.
        """

        def row(measured_batch_size: int) -> Draws:
            where = f"{self.axis} at batch size {measured_batch_size}"
            return self._between(self.rows[measured_batch_size], x, where)

        reaching = sorted(size for size, times in self.rows.items() if min(times) <= x <= max(times))
        fits = reaching and reaching[0] <= batch_size <= reaching[-1]
        # Where none fits, the error says what is missing.
        below, above, share = self._bracket(reaching if fits else sorted(self.rows), batch_size, "batch size")
        if below == above:
            return row(below)
        return (1 - share) * row(below) + share * row(above)

    def _between(self, times: Mapping[int, Draws], x: float, where: str) -> Draws:
        below, above, share = self._bracket(sorted(times), x, where)
        return times[below] if below == above else (1 - share) * times[below] + share * times[above]

    def _bracket(self, given: Sequence[int], x: float, where: str) -> tuple[int, int, float]:
        if not given:
            raise ArgumentError(f"no time of {self.what} is known; give one")
        if not given[0] <= x <= given[-1]:
            span = f"{given[0]}" if len(given) == 1 else f"{given[0]} to {given[-1]}"
            raise ArgumentError(
                f"{self.what} for {where} {x:g} is not predicted: times are given for {span}, and beyond them nothing "
                f"is extrapolated; measure it there"
            )
        above = given[bisect_left(given, x)]
        if above == x:
            return above, above, 0.0
        below = given[bisect_left(given, x) - 1]
        return below, above, (x - below) / (above - below)
