"""Handling of the drafter's faults: a fault costs drafts, never a request and never the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger("vllm.twotower.faults")

# A fault that does not pass costs one attempt in so many rounds at most.
LONGEST_PAUSE = 64


class FaultHandler:
    """Logs every kind of fault once, makes the drafter forget what it left half done, and pauses where faults go on.

    Whoever calls the drafter catches what it raises, hands it to `recover`, and counts the requests left without
    drafts. The n-th failed round in a row is followed by a pause of 2^(n - 1) - 1 rounds, `LONGEST_PAUSE` at most.
    """

    def __init__(self) -> None:
        """Begins without faults."""
        self._logged: set[str] = set()
        self._failed_in_row = self._pause = 0

    def skips_round(self) -> bool:
        """Whether nothing is to be drafted in this round, which is then one fewer of the pause."""
        if not self._pause:
            return False
        self._pause -= 1
        return True

    def round_succeeded(self) -> None:
        """Ends the row of failed rounds."""
        self._failed_in_row = 0

    def recover(self, error: Exception, reset: Callable[[], None]) -> bool:
        """Begins the pause after a failed round; never raises.

        Args:
            error: what the round raised.
            reset: makes the drafter forget all contexts, which the round may have left half done.

        Returns:
            Whether the drafter can be used again.
        """
        self._failed_in_row += 1
        self._pause = min(2 ** (self._failed_in_row - 1) - 1, LONGEST_PAUSE)
        usable = True
        try:
            reset()
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
        except Exception as another:
            usable = False
            self.log(another, "the drafter cannot be reset; vLLM goes on without drafts")
        self.log(error, "a drafting round failed; its requests go on without drafts, contexts are read again")
        return usable

    def log(self, error: Exception, outcome: str) -> None:
        """Logs the first error of every type, with the remedy."""
        kind = type(error).__name__
        if kind in self._logged:
            return
        self._logged.add(kind)
        remedy = "please report this"
        if isinstance(error, torch.OutOfMemoryError):
            remedy = "lower pool_requests or pool_tokens, or place the towers on other devices"
        logger.error("TwoTower: %s (%s: %s); %s", outcome, kind, error, remedy, exc_info=error)
