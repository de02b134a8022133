"""Findings: what was looked at, what became of it, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from twotower_spec.errors import TwoTowerError

Verdict = Literal["ok", "warning", "fault", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: part of the examination.
        looked_at: what was looked at, in a few words.
        verdict: "fault" if a server cannot be started or its drafts would be worth nothing, "warning" if it serves and
            something is lost, "skipped" if it was not looked at.
        detail: what was found, with its figures; why, if it was skipped.
        remedy: what to do; never "" beside a warning or a fault.
    """

    area: str
    looked_at: str
    verdict: Verdict
    detail: str
    remedy: str = ""

    def unless(self, is_fine: bool) -> Finding:
        """Gives the finding, or where nothing is wrong the same with the verdict "ok" and without remedy."""
        return replace(self, verdict="ok", remedy="") if is_fine else self


def refusal(area: str, looked_at: str, error: TwoTowerError, verdict: Verdict = "fault") -> Finding:
    """Makes a finding of an error, whose remedy stands behind its last semicolon."""
    detail, _, remedy = str(error).rpartition("; ")
    return Finding(area, looked_at, verdict, *((detail, remedy) if detail else (remedy, "read what is named there")))
