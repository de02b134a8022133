"""Looks: how a policy that does not draft finds out that drafting would pay.

The context tower reads what one request has written, which tells for each token whether it would have been a right
draft (acceptance.py). Looks take `LOOK_SHARE` of the time at most. One that is more than that of `LOOK_ROUNDS` rounds
by itself waits until it is no more than that of the time that has passed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

from twotower_spec.drafting.policies.acceptance import Acceptance
from twotower_spec.drafting.policies.costs import ACCIDENT
from twotower_spec.drafting.policies.policy import Candidate

LOOK_SHARE, LOOK_ROUNDS = 0.01, 100
# A look that has taken so many times what was expected is given up.
LONGEST_OVERRUN = 2.0
# Tokens that a look tells of at least. With 16 the decision after a change of texts was wrong so often that simulated
# servers lost 3 % more (tests/drafting/served_texts.py).
LEAST_TOLD = 32


class LookBudget:
    """Seconds that looks may take."""

    def __init__(self) -> None:
        """Begins with nothing saved."""
        self._rounds: deque[tuple[float, float, int]] = deque()
        self._spent_s, self._total_s, self._num_rounds = 0.0, 0.0, 0
        # Saved up for a long look, of which the longest one asked for since the last would take so much.
        self._saved_s = self._wanted_s = 0.0

    def affords(self, seconds: float, plain_s: float) -> bool:
        """Whether something may take so much longer than a plain round."""
        fits = self._saved_s >= 0 and self._spent_s + seconds <= LOOK_SHARE * (self._total_s + plain_s)
        return fits or seconds <= self._saved_s

    def wants(self, seconds: float) -> None:
        """Saves for a look that would take so much."""
        self._wanted_s = max(self._wanted_s, seconds)

    def add(self, spent_s: float, expected_s: float, total_s: float, num_rounds: int = 1) -> None:
        """Counts rounds, and what of them was a look.

        A look is paid for as an accident at most: a machine that stood still for seconds would end all looks for
        hundreds of times as long.

        Args:
            spent_s: seconds of the look.
            expected_s: those that were expected of it; 0 where nobody knew.
            total_s: seconds of the rounds, the look included.
            num_rounds: how many they were.
        """
        if expected_s:
            spent_s = min(spent_s, ACCIDENT * expected_s)
        self._rounds.append((spent_s, total_s, num_rounds))
        self._count(spent_s, total_s, num_rounds)
        while self._num_rounds >= LOOK_ROUNDS:
            spent, total, num = self._rounds.popleft()
            self._count(-spent, -total, -num)
        self._saved_s = min(self._saved_s + LOOK_SHARE * total_s, self._wanted_s) - spent_s
        if spent_s:
            self._wanted_s = 0.0

    def _count(self, spent_s: float, total_s: float, num_rounds: int) -> None:
        self._spent_s, self._total_s = self._spent_s + spent_s, self._total_s + total_s
        self._num_rounds += num_rounds


class Look:
    """One look, over as many rounds as it takes to read the context.

    Attributes:
        request_id: whose.
        num_tokens: drafts that end it; 0 for none.
        expected_s: seconds that it should take.
        num_awaited: rounds in which the outcome of one of its own is waited for, before it goes on.
    """

    def __init__(self, request_id: Hashable, num_tokens: int, expected_s: float) -> None:
        """Begins one that is expected to take so long."""
        self.request_id, self.num_tokens, self.expected_s = request_id, num_tokens, expected_s
        self._left_s = LONGEST_OVERRUN * expected_s
        self.num_awaited = 0

    def is_over(self, spent_s: float, has_told: bool, has_read: bool, has_drafts: bool) -> bool:
        """Whether it is, after a round of it; one that reads nothing more has come to its end too."""
        self._left_s -= spent_s
        self.num_awaited = 0
        return has_drafts or (has_told and not self.num_tokens) or not has_read or self._left_s <= 0


def most_telling(acceptance: Acceptance, candidates: Sequence[Candidate], rows: Sequence[int]) -> int | None:
    """The row whose reading tells most for its length; None where none tells enough."""
    best, most = None, 0.0
    least = min(LEAST_TOLD, acceptance.mean_tokens // 2)
    for row in rows:
        request_id, unread = candidates[row].request_id, candidates[row].num_unread
        told = min(unread, acceptance.num_tokens(request_id))
        if told >= (LEAST_TOLD if acceptance.is_known(request_id) else least) and told > most * unread:
            best, most = row, told / unread
    return best
