"""Seconds of a round, known before it, and the one formula by which drafting pays.

    seconds  = plain(requests) + extra(drafts) + extend(new tokens) + passes * denoise(rows) + host(rows)
    speed-up = acceptance length * plain(requests) / seconds

`plain` is the target's step without drafts, `extra` what it takes longer to verify some. Each term is a table of
measured times with straight lines in between: filled by the warm-up, and kept right by the rounds that happen anyway.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from itertools import accumulate
from statistics import median_low
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# A time is the (lower) median of so many: it follows a change after three, and two in which something else went on do
# not count.
RECENT = 5
# Fewest of a size that tell: the first passes of a kind make what is made once.
LEAST = 3
# Fewer of them that are so many times what is usual are an accident, such as a machine that stood still for seconds: if
# they counted, nothing of their size might be tried again, and so nothing would correct them.
ACCIDENT = 4.0

# Of one round, or of several that are compared.
Seconds = TypeVar("Seconds", float, npt.NDArray[np.float64])


def round_seconds(
    verify_s: Seconds, extend_s: Seconds, denoise_s: Seconds, num_passes: float, host_s: float = 0.0
) -> Seconds:
    """Time of a round: its verification, the context tower's pass, the denoiser's passes, and the host's work."""
    return verify_s + extend_s + num_passes * denoise_s + host_s


def speed_up(
    acceptance_length: float,
    plain_s: float,
    verify_s: float,
    extend_s: float,
    denoise_s: float,
    num_passes: float = 1.0,
    host_s: float = 0.0,
) -> float:
    """Tokens per second with drafts over those without, under the same load.

    A round gains `acceptance_length` tokens of each request in `round_seconds`; a plain step gains one, in `plain_s`.
    Times are of the whole batch, all in one unit.
    """
    return acceptance_length * plain_s / round_seconds(verify_s, extend_s, denoise_s, num_passes, host_s)


class TimeTable:
    """Seconds over a size: medians of recent measurements of about one size, and straight lines in between.

    Below the smallest size a pass takes as long as there, or proportionally less `from_zero`. Beyond the largest,
    seconds go on in proportion to the size.
    """

    def __init__(self, from_zero: bool = False) -> None:
        """Begins empty.

        Args:
            from_zero: nothing takes no time.
        """
        self._measured: dict[int, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._medians: dict[int, tuple[float, float]] = {0: (0.0, 0.0)} if from_zero else {}
        self._sizes: list[float] = []
        self._seconds: list[float] = []

    def knows(self, size: float) -> bool:
        """Whether sizes within a factor of two were measured often enough."""
        return len(self._measured.get(int(size).bit_length(), ())) >= LEAST

    def add(self, size: float, seconds: float, usual: float | None = None) -> None:
        """Counts a measurement, among those of sizes within a factor of two.

        Args:
            size, seconds: that were measured.
            usual: seconds that would be no surprise; None for those that are known of other sizes.
        """
        if usual is None:
            usual = self.at(size)
        group = int(size).bit_length()
        measured = self._measured[group]
        measured.append((size, seconds))
        median = median_low(s for _, s in measured)
        if len(measured) < LEAST and median > ACCIDENT * usual > 0:
            return
        self._medians[group] = sum(size for size, _ in measured) / len(measured), median
        points = sorted(self._medians.values())
        self._sizes = [size for size, _ in points]
        # More work never takes less time: where it seems so it is noise.
        self._seconds = list(accumulate((seconds for _, seconds in points), max))

    def at(self, size: float) -> float:
        """Seconds at a size; 0 where nothing was measured."""
        sizes, seconds = self._sizes, self._seconds
        if not sizes or size <= sizes[0]:
            return seconds[0] if sizes else 0.0
        if size >= sizes[-1]:
            return seconds[-1] * size / sizes[-1]
        i = bisect_right(sizes, size)
        share = (size - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])

    def over(self, sizes: Array) -> Array:
        """Seconds [...] at sizes [...]."""
        if not self._sizes:
            return np.zeros_like(sizes)
        largest = max(self._sizes[-1], 1.0)
        times: Array = np.interp(sizes, self._sizes, self._seconds)
        return times + self._seconds[-1] / largest * np.clip(sizes - largest, 0.0, None)


class RoundCosts:
    """Times of the terms of a round.

    Attributes:
        plain: over requests.
        extra: over drafts of all requests together.
        extend: over tokens that the context tower reads.
        host: over rows that are drafted for: drafting that is none of the towers'.
    """

    def __init__(self) -> None:
        """Begins without any."""
        self.plain, self.extra, self._drafted = TimeTable(), TimeTable(from_zero=True), TimeTable()
        self.extend, self.host = TimeTable(from_zero=True), TimeTable()
        self._denoise: dict[int, TimeTable] = defaultdict(TimeTable)

    def add_verification(self, num_reqs: int, num_drafts: int, seconds: float) -> None:
        """Counts a pass of the target that read no prompts."""
        if not num_drafts:
            self.plain.add(num_reqs, seconds)
            return
        if not self.plain.knows(num_reqs):
            return
        plain_s = self.plain.at(num_reqs)
        # No token takes longer than one of a plain step.
        self.extra.add(num_drafts, max(0.0, seconds - plain_s), usual=plain_s * num_drafts / num_reqs)
        self._drafted.add(num_reqs, seconds)
        if self._drafted.knows(num_reqs) and self._drafted.at(num_reqs) < plain_s:
            self.plain.add(num_reqs, self._drafted.at(num_reqs))  # without drafts they had not taken longer

    def denoise(self, block_size: int) -> TimeTable:
        """Seconds of one denoiser pass over its rows."""
        return self._denoise[block_size]
