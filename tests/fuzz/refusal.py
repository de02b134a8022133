"""The property: whatever comes in is taken, or refused in the project's own words; soon, and shortly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import settings

from twotower_spec.errors import TwoTowerError
from twotower_spec.printable import LONGEST_LINE, MOST_LINES

# Of a processor: what takes longer never ends, or grows faster than its input. Honest cases take a second or two.
LONGEST_S = 60.0


def fuzzed(share: float = 1.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Sets the number of cases of a test: a share, less than 1 where cases take long, of that of the profile."""
    profile = settings.get_current_profile_name()
    chosen = settings.get_profile(profile if profile in ("short", "long") else "short")
    return settings(chosen, max_examples=max(5, round(share * chosen.max_examples)))


@contextmanager
def taken_or_refused() -> Iterator[None]:
    """Checks what happens inside; another exception than ours goes through."""
    began = time.process_time()
    try:
        yield
    except TwoTowerError as error:
        check_message(str(error))
    took = time.process_time() - began
    assert took < LONGEST_S, f"took {took:.1f} s of a processor"


def refuses_or_takes(action: Callable[..., Any], *arguments: Any) -> None:
    """The same, of a call."""
    with taken_or_refused():
        action(*arguments)


def check_message(message: str) -> None:
    """A sentence of bounded length, with a bounded list at most, and without control characters."""
    lines = message.split("\n  ")
    assert len(lines) <= 1 + MOST_LINES
    assert all(line.isprintable() and len(line) <= LONGEST_LINE for line in lines), ascii(message[:2000])
    assert len(message) > 10
