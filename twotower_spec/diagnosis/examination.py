"""Examination: all checks one after the other; what goes wrong in one of them is a finding, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points

from twotower_spec.diagnosis import computation, environment, files, links, memory, short_run, vocabulary, weights
from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.finding import Finding, refusal
from twotower_spec.errors import TwoTowerError, first_line

# Group of entry points, each a check of a package above this one; its area is the entry's name.
CHECKS_GROUP = "twotower_spec.checks"
MODELS = ("drafter", "verifier")


@dataclass(frozen=True)
class Check:
    """Check of one area.

    Attributes:
        area: its findings are of.
        examine: yields them.
        models: that it needs, of `drafter` and `verifier`.
        after: areas without which there is nothing to look at: one with a fault has it skipped.
    """

    area: str
    examine: Callable[[Case], Iterable[Finding]]
    models: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def all_checks() -> list[Check]:
    """Checks in their order, those of packages above this one last but for the short run."""
    above = [Check(entry.name, partial(_loaded, entry)) for entry in entry_points(group=CHECKS_GROUP)]
    return [
        Check("environment", environment.examine),
        Check("links", links.examine),
        Check("files", files.examine_drafter, ("drafter",)),
        Check("files", files.examine_verifier, ("verifier",)),
        Check("vocabulary", vocabulary.examine_drafter, ("drafter",), ("files",)),
        Check("vocabulary", vocabulary.examine_pair, MODELS, ("files",)),
        Check("memory", memory.examine, MODELS, ("files",)),
        Check("weights", weights.examine, ("drafter",), ("files", "memory")),
        Check("computation", computation.examine, ("drafter",), ("files", "memory", "weights")),
        *above,
        Check("short run", short_run.examine, MODELS, ("files", "vocabulary", "memory", "weights", "computation")),
    ]


def examine(case: Case) -> Iterator[Finding]:
    """Yields findings as they are made; raises nothing that a check raises."""
    at_fault: list[str] = []
    for check in all_checks():
        for finding in _findings(check, case, at_fault):
            if finding.verdict == "fault":
                at_fault.append(finding.area)
            yield finding


def _loaded(entry: EntryPoint, case: Case) -> Iterable[Finding]:
    """Imports a check no earlier than it is made, so that a broken one is a finding."""
    found: Iterable[Finding] = entry.load()(case)
    return found


def _findings(check: Check, case: Case, at_fault: list[str]) -> Iterator[Finding]:
    lacking = next((model for model in check.models if getattr(case, model) is None), None)
    broken = next((area for area in check.after if area in at_fault), None)
    if lacking or broken:
        reason = f"no {lacking} is named" if lacking else f"there is a fault in {broken}, which comes first"
        yield Finding(check.area, " and ".join(check.models), "skipped", reason, f"--{lacking}" if lacking else "")
        return
    try:
        yield from check.examine(case)
    except TwoTowerError as error:
        yield refusal(check.area, " and ".join(check.models) or check.area, error)
    # Whatever a check did not expect: a finding as well, and others follow.
    except Exception as error:
        detail = f"the check itself failed ({type(error).__name__}: {first_line(error)})"
        yield Finding(check.area, "the check", "fault", detail, "report it, with the config.json of both models")
