"""Pauses after failures that go on: what does not pass is tried ever more rarely, never given up."""

from __future__ import annotations

# A fault that does not pass costs one attempt in so many rounds at most.
LONGEST_PAUSE = 64


class Backoff:
    """Counts failures in a row and the rounds to sit out after them.

    The n-th failure in a row is followed by a pause of 2^(n - 1) - 1 rounds, `LONGEST_PAUSE` at most.
    """

    def __init__(self) -> None:
        """Begins without failures."""
        self._failed_in_row = self._pause = 0

    def skips_round(self) -> bool:
        """Whether to sit this round out, which is then one fewer of the pause."""
        if not self._pause:
            return False
        self._pause -= 1
        return True

    def failed(self) -> None:
        """Begins the pause after a failure."""
        self._failed_in_row += 1
        # Shifting by the whole count would make ever larger numbers.
        self._pause = min((1 << min(self._failed_in_row - 1, LONGEST_PAUSE)) - 1, LONGEST_PAUSE)

    def succeeded(self) -> None:
        """Ends the row of failures."""
        self._failed_in_row = 0
