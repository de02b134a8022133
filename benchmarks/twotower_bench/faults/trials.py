"""Trials: faults of processes and files, each by itself, and what they showed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Trial:
    """One fault of a process or a file.

    Attributes:
        what: was done, and to what.
        must: hold.
        seen: in a few words.
        faults: what does not hold; empty for a trial that is right.
        reason: of a trial that cannot be made here; nothing was run then.
    """

    what: str
    must: str
    seen: str = ""
    faults: tuple[str, ...] = ()
    reason: str = ""

    @property
    def outcome(self) -> Literal["held", "failed", "n/a"]:
        """Whether all that must hold did."""
        return "n/a" if self.reason else "failed" if self.faults else "held"
