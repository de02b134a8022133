"""Checks after a soak: what must hold, what was found, and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from twotower_bench.soak.answers import Answer, Difference
from twotower_bench.soak.traffic import Request
from twotower_bench.soak.watch import Holding, IdlePoint, early_and_last

MIB = 2**20
# More than the server without speculation at the same number of requests.
MOST_GROWTH_BYTES = 20 * MIB
# Reasons for which a request gets no drafts that are none while all is well.
FAULTS = ("not finite", "error", "recovering", "not loaded", "no runner")


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Attributes:
        what: was looked at.
        found, allowed: in words.
        holds: whether it does.
    """

    what: str
    found: str
    allowed: str
    holds: bool


@dataclass
class Side:
    """All that is known of one of both servers.

    Attributes:
        num_requests, num_answered, num_left: sent; answered in whole; clients that left before the end.
        failed: requests with answers that are none.
        points: after every lap.
        errors: lines of its log.
    """

    num_requests: int = 0
    num_answered: int = 0
    num_left: int = 0
    failed: list[tuple[Request, Answer]] = field(default_factory=list)
    points: list[IdlePoint] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """All that is known of a soak.

    Attributes:
        drafting, plain: both servers.
        num_greedy, num_seeded: answers compared.
        greedy, seeded: those that differ.
        is_coupled: whether a seed has one answer.
        drafts_for_certain: whether something must have been drafted.
        counters: of the server that drafts, at the end.
    """

    is_coupled: bool = True
    drafts_for_certain: bool = True
    drafting: Side = field(default_factory=Side)
    plain: Side = field(default_factory=Side)
    num_greedy: int = 0
    num_seeded: int = 0
    greedy: list[Difference] = field(default_factory=list)
    seeded: list[Difference] = field(default_factory=list)
    counters: Mapping[str, float] = field(default_factory=dict)


def checks_of(findings: Findings) -> list[Check]:
    """Every check of a soak, in the order in which they are shown."""
    ours, plain = findings.drafting, findings.plain
    found = [
        _answered("requests answered", ours),
        _answered("requests answered without speculation", plain),
        _at_least("clients that left", ours.num_left),
        _same("temperature-0 answers equal to those without speculation", findings.num_greedy, findings.greedy),
    ]
    if findings.is_coupled:
        found.append(_same("answers to a seed equal in repeats", findings.num_seeded, findings.seeded))
    names = ours.points[-1].processes
    found += [_memory(name, ours.points, plain.points) for name in names]
    for what, count in (("descriptors", "num_fds"), ("threads", "num_threads")):
        found += [_flat(f"{what} of {name}", name, _count_of(count), ours.points, plain.points) for name in names]
    found.append(_empty_when_idle(ours.points))
    for what, name in (
        ("preemptions", "preemptions"),
        ("prompt tokens from the prefix cache", "hits"),
        *((("drafts accepted", "accepted"),) if findings.drafts_for_certain else ()),
    ):
        found.append(_at_least(what, findings.counters.get(name, 0)))
    found.append(_none("rounds and steps that failed", findings.counters.get("faults", 0)))
    new, old = new_errors(findings), f"0 but those of the server without speculation ({len(plain.errors)})"
    found.append(Check("error lines in the log", str(len(new)), old, not new))
    return found


def new_errors(findings: Findings) -> list[str]:
    """Error lines of the server that drafts that the one without speculation does not have."""
    return [line for line in findings.drafting.errors if line not in findings.plain.errors]


def _answered(what: str, side: Side) -> Check:
    whole = side.num_answered + side.num_left
    found = f"{side.num_answered} and {side.num_left} left, of {side.num_requests}"
    return Check(what, found, "all", whole == side.num_requests > 0)


def _at_least(what: str, number: float) -> Check:
    return Check(what, f"{number:.0f}", "1 or more", number >= 1)


def _none(what: str, number: float) -> Check:
    return Check(what, f"{number:.0f}", "0", number == 0)


def _same(what: str, num_compared: int, different: Sequence[Difference]) -> Check:
    return Check(what, f"{len(different)} of {num_compared} differ", "0 differ", num_compared > 0 and not different)


def _memory(name: str, ours: Sequence[IdlePoint], plain: Sequence[IdlePoint]) -> Check:
    grown, plain_grown = (_growth(name, lambda one: one.memory_bytes, points) for points in (ours, plain))
    early, last = early_and_last(ours)
    found = f"{grown / MIB:+.1f} MiB from request {early.num_requests} to {last.num_requests}"
    allowed = f"{(plain_grown + MOST_GROWTH_BYTES) / MIB:.1f} (without speculation {plain_grown / MIB:+.1f})"
    return Check(f"memory of {name}", found, allowed, grown - plain_grown <= MOST_GROWTH_BYTES)


def _flat(
    what: str, name: str, count: Callable[[Holding], int], ours: Sequence[IdlePoint], plain: Sequence[IdlePoint]
) -> Check:
    grown, plain_grown = (_growth(name, count, points) for points in (ours, plain))
    early, last = (count(point.processes[name]) for point in early_and_last(ours))
    most = max(0, plain_grown)
    return Check(what, f"{early}, then {last}", f"{most:+d} (without speculation {plain_grown:+d})", grown <= most)


def _empty_when_idle(points: Sequence[IdlePoint]) -> Check:
    held = [f"{value:g} {what}" for point in points for what, value in point.held.items() if value]
    found = ", ".join(held) or f"empty at {len(points)} idle points"
    return Check("pool and KV cache when idle", found, "empty", not held)


def _growth(name: str, count: Callable[[Holding], int], points: Sequence[IdlePoint]) -> int:
    early, last = early_and_last(points)
    return count(last.processes[name]) - count(early.processes[name])


def _count_of(field_name: str) -> Callable[[Holding], int]:
    def count(holding: Holding) -> int:
        number: int = getattr(holding, field_name)
        return number

    return count
