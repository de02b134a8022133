"""The matrix as rows of tables, for the terminal and for docs/faults.md."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from twotower_bench.faults.cells import WHENS, Seen
from twotower_bench.faults.trials import Trial

COLUMNS = (
    "stage",
    "fault",
    "outcome",
    "fired",
    "answered",
    "equal",
    "steps until back",
    "accepted after",
    "sentences",
    "without drafts",
    "remark",
)
TRIAL_COLUMNS = ("fault", "must hold", "outcome", "seen")


def summary(found: Sequence[Seen | Trial]) -> str:
    """How many held."""
    counts = Counter(one.outcome for one in found)
    outcomes = f"{counts['held']} held, {counts['failed']} failed, {counts['n/a']} that a stage cannot have"
    return f"{len(found)} cells: {outcomes}"


def rows_of(seen: Sequence[Seen]) -> list[dict[str, str]]:
    """A row for every stage and kind of fault; numbers are those of before / during / after a load."""
    groups = defaultdict[tuple[str, str], list[Seen]](list)
    for one in seen:
        groups[one.cell.stage, one.cell.kind].append(one)
    return [{"stage": stage, "fault": kind, **_columns(cells)} for (stage, kind), cells in groups.items()]


def trial_rows(trials: Sequence[Trial]) -> list[dict[str, str]]:
    """A row for every fault of a process or a file."""
    return [
        {
            "fault": one.what,
            "must hold": one.must,
            "outcome": one.outcome,
            "seen": one.reason or "; ".join([*one.faults, one.seen]),
        }
        for one in trials
    ]


def _columns(cells: Sequence[Seen]) -> dict[str, str]:
    if all(one.reason for one in cells):
        return {"outcome": "n/a", "remark": cells[0].reason}
    counted = Counter[str]()
    for one in cells:
        counted.update(one.counted)
    by_when = {one.cell.when: one for one in cells}
    faults = [f"{one.cell.when}: {fault}" for one in cells for fault in one.faults]
    num_requests = sum(one.num_requests for one in cells)
    return {
        "outcome": "failed" if faults else "held",
        "fired": _each(by_when, lambda one: one.num_fired),
        "answered": f"{sum(one.num_answered for one in cells)}/{num_requests}",
        "equal": f"{sum(one.num_equal for one in cells)}/{num_requests}",
        "steps until back": _each(by_when, lambda one: one.num_steps_back),
        "accepted after": _each(by_when, lambda one: one.num_accepted_after),
        "sentences": _each(by_when, lambda one: len(one.sentences)),
        "without drafts": ", ".join(f"{name} {count}" for name, count in sorted(counted.items()) if count) or "none",
        "remark": "; ".join(faults),
    }


def _each(by_when: Mapping[str, Seen], of: Callable[[Seen], int]) -> str:
    return " / ".join(str(of(by_when[when])) for when in WHENS if when in by_when)
