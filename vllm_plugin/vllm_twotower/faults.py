"""Handling of the drafter's faults: a fault costs drafts, never a request and never the engine."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable
from contextlib import suppress

import torch

from twotower_spec.drafting import Round
from twotower_spec.drafting.backoff import Backoff

logger = logging.getLogger("vllm.twotower.faults")

# More numbers in a row than any shape has, however they are printed.
_ROW_OF_NUMBERS = re.compile(r"(?<!\d)\d++(?:(?:\\n|\W)++(?:[A-Za-z_][\w.]*+\()?\d++){5,}")


def without_tokens(text: str) -> str:
    """A text for the log, in which rows of numbers are left out: an error may name the tokens of a request."""
    return _ROW_OF_NUMBERS.sub("...", text)


def traceback_of(error: Exception) -> str:
    """Where an error was raised and by what, for the log."""
    return without_tokens("".join(traceback.format_exception(error))).rstrip()


class FaultHandler:
    """Logs every kind of fault once, makes the drafter forget what it left half done, and pauses where faults go on.

    Whoever calls the drafter catches what it raises, hands it to `recover`, and counts the requests left without
    drafts; a round that ended is handed to `judge`. `Backoff` says how long the pauses are.
    """

    def __init__(self) -> None:
        """Begins without faults."""
        self._logged: set[str] = set()
        self._backoff = Backoff()
        # What makes the drafter forget all contexts, where that has failed.
        self._reset_again: Callable[[], None] | None = None

    def skips_round(self) -> bool:
        """Whether nothing is to be drafted in this round, which is then one fewer of the pause."""
        return self._backoff.skips_round()

    def judge(self, ended: Round) -> None:
        """Begins a pause after a round that gave nothing but NaN, and ends the row of failures after a sound one."""
        if ended.num_damaged:
            self._log_once(
                "NaN",
                "TwoTower: a tower or its state gave NaN; drafts of %d requests are dropped, their contexts are read "
                "again, after pauses that grow if this goes on; look for NaN in the checkpoint's weights then, or give "
                "another dtype",
                ended.num_damaged,
            )
        if ended.num_denoised > ended.num_damaged:
            self._backoff.succeeded()
        elif ended.num_damaged:
            self._backoff.failed()

    def recover(self, error: Exception, reset: Callable[[], None]) -> None:
        """Begins the pause after a failed round; never raises.

        Args:
            error: what the round raised.
            reset: makes the drafter forget all contexts, which the round may have left half done. Where it fails,
                `is_usable` tries it again.
        """
        self._backoff.failed()
        self._reset(reset)
        if isinstance(error, torch.OutOfMemoryError):
            with suppress(Exception):
                torch.cuda.empty_cache()
        self.log(error, "a drafting round failed; its requests go on without drafts, contexts are read again")

    def is_usable(self) -> bool:
        """Whether the drafter holds nothing half done; never raises.

        A reset that has failed is tried again, after pauses that grow.
        """
        if self._reset_again is None:
            return True
        if self._backoff.skips_round():
            return False
        self._reset(self._reset_again)
        if self._reset_again is not None:
            self._backoff.failed()
        return self._reset_again is None

    def _reset(self, reset: Callable[[], None]) -> None:
        """Resets the drafter, or remembers that this is to be done."""
        self._reset_again = None
        try:
            reset()
        except Exception as error:
            self._reset_again = reset
            self.log(error, "the drafter cannot be reset and drafts nothing until it can")

    def log(self, error: Exception, outcome: str) -> None:
        """Logs the first error of every type, with the remedy."""
        kind = type(error).__name__
        remedy = "please report this"
        if isinstance(error, torch.OutOfMemoryError):
            remedy = "lower pool_requests or pool_tokens, or place the towers on other devices"
        said = without_tokens(str(error))
        self._log_once(kind, "TwoTower: %s (%s: %s); %s\n%s", outcome, kind, said, remedy, traceback_of(error))

    def _log_once(self, kind: str, text: str, *values: object) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error(text, *values)
