"""The way to speculate that a sweep speaks for, for what the user wants, and the flags of it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from twotower_bench.engine_flags import engine_flags
from twotower_bench.pareto import pareto_front
from twotower_bench.records import ALL_CATEGORIES, BASELINE, BASELINE_AGAIN, Load, ServingCell, System
from twotower_bench.summary import latency_of, repeats_of
from twotower_spec.config import check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.statistics import (
    FEWEST_ROUNDS,
    Comparison,
    Estimate,
    compare_same_repeats,
    median_and_spread,
)

GoalName = Literal["throughput", "latency"]


@dataclass(frozen=True)
class Goal:
    """Goal of the user: fast for all together or fast for one.

    Attributes:
        name: "throughput" for most tokens/s of all users together, "latency" for the fastest text of one user.
        min_user_tokens_per_s: with "throughput", what every user shall have at least; None for no such wish.
        concurrency: requests at once; None for any that was measured.

    Raises:
        ArgumentError: a value is not allowed.
    """

    name: GoalName = "throughput"
    min_user_tokens_per_s: float | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(GoalName):
            raise ArgumentError(f"goal {self.name!r} is not allowed; give one of {', '.join(get_args(GoalName))}")
        if self.concurrency is not None:
            check_integer("concurrency", self.concurrency, minimum=1)
        if self.min_user_tokens_per_s is not None:
            if not 0 < self.min_user_tokens_per_s < math.inf:
                raise ArgumentError(
                    f"min_user_tokens_per_s {self.min_user_tokens_per_s} is not allowed; give a number above 0"
                )
            if self.name == "latency":
                raise ArgumentError(
                    f"min_user_tokens_per_s {self.min_user_tokens_per_s:g} has no meaning for the goal latency, which "
                    f"is the fastest for one user; leave it out, or ask for throughput"
                )

    def __str__(self) -> str:
        floor = self.min_user_tokens_per_s
        return (
            self.name
            + ("" if floor is None else f" with {floor:g} tokens/s for every user")
            + ("" if self.concurrency is None else f" at concurrency {self.concurrency}")
        )


@dataclass(frozen=True)
class Point:
    """A system at one concurrency, over all repeats.

    Attributes:
        system: what was measured.
        load: what it was asked.
        tokens_per_s: of all requests together.
        user_tokens_per_s: of one request, from its first token on; the median over requests.
    """

    system: System
    load: Load
    tokens_per_s: Estimate
    user_tokens_per_s: Estimate

    def value(self, goal: Goal) -> Estimate:
        """Speed that the goal is about."""
        return self.user_tokens_per_s if goal.name == "latency" else self.tokens_per_s

    def __str__(self) -> str:
        return (
            f"{self.system.title} at concurrency {self.load.concurrency} ({self.tokens_per_s.value:.4g} tokens/s, "
            f"{self.user_tokens_per_s.value:.4g} for each user)"
        )


@dataclass(frozen=True)
class Recommendation:
    """Point that a sweep recommends, and why.

    Attributes:
        goal: that was asked for.
        point: to use; may be no speculation.
        no_speculation: the best point without any.
        comparison: of the two, or, where no speculation is recommended, of the best that speculates with it; None with
            fewer than three repeats or without an A/A run.
        runners_up: other points that speculate and fall behind `point` by no more than the A/A noise; best first. Empty
            without a comparison.
        sentence: what is recommended and why.
    """

    goal: Goal
    point: Point
    no_speculation: Point
    comparison: Comparison | None
    runners_up: tuple[Point, ...]
    sentence: str

    def serve_command(self, verifier: str | Path, arguments: Mapping[str, Any]) -> str:
        """One line for a shell.

        Args:
            verifier: directory or hub id.
            arguments: of `LLM()`, that it was measured with; requests at once are the goal's to limit.
        """
        return shlex.join(["vllm", "serve", str(verifier), *engine_flags(self._arguments(arguments))])

    def python_call(self, verifier: str | Path, arguments: Mapping[str, Any]) -> str:
        """The same in Python."""
        keywords = {"model": str(verifier), **self._arguments(arguments)}
        return f"LLM({', '.join(f'{name}={value!r}' for name, value in keywords.items())})"

    def _arguments(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        config = self.point.system.speculative_config
        found = {**({"speculative_config": dict(config)} if config else {}), **measured}
        found.pop("max_num_seqs", None)
        # More users at once would have less each.
        if self.goal.min_user_tokens_per_s is not None and self.goal.concurrency is None:
            found["max_num_seqs"] = self.point.load.concurrency
        return found


def sweep_points(cells: Sequence[ServingCell], temperature: float = 0.0, category: str = ALL_CATEGORIES) -> list[Point]:
    """Every system at every concurrency, in the order in which they come first; the A/A run is no point of its own.

    Args:
        cells: of a sweep.
        temperature, category: of the load.
    """
    places = dict.fromkeys(
        (cell.system.name, cell.load)
        for cell in cells
        if (cell.load.temperature, cell.load.category) == (temperature, category) and cell.system.name != BASELINE_AGAIN
    )
    repeats = {place: repeats_of(cells, *place) for place in places}
    together, user = (
        {place: median_and_spread([_rate(cell, goal) for cell in own]) for place, own in repeats.items()}
        for goal in get_args(GoalName)
    )
    return [Point(own[0].system, place[1], together[place], user[place]) for place, own in repeats.items()]


def front_of(points: Sequence[Point]) -> list[Point]:
    """The Pareto front: points that no other beats both in tokens/s of all and in those of one user; slowest first."""
    medians = [(one.tokens_per_s.value, one.user_tokens_per_s.value) for one in points]
    return [points[i] for i in pareto_front(medians)]


def recommend(
    cells: Sequence[ServingCell], goal: Goal, temperature: float = 0.0, category: str = ALL_CATEGORIES
) -> Recommendation:
    """The best for a goal; no speculation where nothing is faster than it beyond the noise.

    Args:
        cells: of a sweep, with those of no speculation, twice.
        goal: what is wanted.
        temperature, category: of the load.

    Raises:
        ArgumentError: no speculation was not measured there.
    """
    points = [
        point
        for point in sweep_points(cells, temperature, category)
        if goal.concurrency in (None, point.load.concurrency)
    ]
    if not any(point.system.name == BASELINE for point in points):
        known = sorted({(cell.load.temperature, cell.load.concurrency) for cell in cells})
        places = ", ".join(f"temperature {one:g} and concurrency {other}" for one, other in known)
        where = "any concurrency" if goal.concurrency is None else f"concurrency {goal.concurrency}"
        raise ArgumentError(
            f"no cell without speculation at temperature {temperature:g} and {where} is among those measured, which "
            f"are of {places or 'nothing'}; measure it, or ask for one of these"
        )
    floor = goal.min_user_tokens_per_s
    reaching = [point for point in points if floor is None or point.user_tokens_per_s.value >= floor]
    if reaching:
        return _recommended(cells, goal, points, reaching)
    closest = _recommended(cells, Goal("latency", concurrency=goal.concurrency), points, points)
    return replace(closest, sentence=f"Nothing that was measured gives {goal}. {closest.sentence}")


def best_by_concurrency(
    cells: Sequence[ServingCell], temperature: float = 0.0, category: str = ALL_CATEGORIES
) -> list[Recommendation]:
    """Recommends what gives most tokens/s at each concurrency, smallest first."""
    points = sweep_points(cells, temperature, category)
    concurrencies = sorted({point.load.concurrency for point in points if point.system.name == BASELINE})
    return [recommend(cells, Goal(concurrency=number), temperature, category) for number in concurrencies]


def _recommended(
    cells: Sequence[ServingCell], goal: Goal, points: Sequence[Point], reaching: Sequence[Point]
) -> Recommendation:
    """Chooses among the points that reach the floor."""
    ranked = sorted(reaching, key=lambda one: one.value(goal).value, reverse=True)
    plain = [one for one in ranked if one.system.name == BASELINE]
    speculating = [one for one in ranked if one.system.name != BASELINE]
    comparison, runners_up = None, []
    if not plain:  # and so there is one that speculates
        slow = (one for one in points if one.system.name == BASELINE)
        baseline = max(slow, key=lambda one: one.user_tokens_per_s.value)
        chosen, most = speculating[0], baseline.user_tokens_per_s.value
        why = f"no speculation does not reach that: it gives each user {most:.4g} at most"
    elif not speculating:
        chosen = baseline = plain[0]
        why = "nothing that speculates was measured, or reaches that"
    else:
        # The best alone is asked: of many that are no better, one looks better in the end.
        best, chosen = speculating[0], plain[0]
        baseline = chosen
        comparison = _comparison(cells, goal, baseline, best)
        against, verdict = _against(goal, baseline, best, comparison), comparison.verdict if comparison else None
        if best.value(goal).value > baseline.value(goal).value and verdict in (None, "faster"):
            doubt = "" if verdict else f"; to tell that from noise takes {FEWEST_ROUNDS} repeats and an A/A run"
            # The best of many looks better than it is.
            many = f"; it is the best of {len(speculating)}, so measure it anew to confirm"
            chosen, why = best, f"it is {against} as no speculation{doubt}{many if len(speculating) > 1 else ''}"
        else:
            noise = ", which cannot be told from noise" if verdict == "no difference" else ""
            why = f"the best that speculates, {best}, is {against} as that{noise}"
    if comparison:
        lowest = chosen.value(goal).value / comparison.noise_floor
        runners_up = [one for one in speculating if one != chosen and one.value(goal).value >= lowest]
    sentence = f"For {goal}: {chosen}, because {why}."
    return Recommendation(goal, chosen, baseline, comparison, tuple(runners_up), sentence)


def _comparison(cells: Sequence[ServingCell], goal: Goal, baseline: Point, candidate: Point) -> Comparison | None:
    places = ((BASELINE, baseline.load), (candidate.system.name, candidate.load), (BASELINE_AGAIN, baseline.load))
    return compare_same_repeats(
        *({cell.repeat: _rate(cell, goal.name) for cell in repeats_of(cells, *one)} for one in places)
    )


def _rate(cell: ServingCell, goal: GoalName) -> float:
    return latency_of(cell.requests).user_tokens_per_s if goal == "latency" else cell.tokens_per_s


def _against(goal: Goal, baseline: Point, candidate: Point, comparison: Comparison | None) -> str:
    if comparison is None:
        return f"{candidate.value(goal).value / baseline.value(goal).value:.2f} times as fast"
    ratio = comparison.speed_up
    return (
        f"{ratio.value:.2f} times as fast ({comparison.interval_name} {ratio.low:.2f} to {ratio.high:.2f}, "
        f"A/A noise {comparison.noise_floor:.2f}, {comparison.num_rounds} rounds)"
    )
