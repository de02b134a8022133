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
from twotower_bench.records import BASELINE, BASELINE_AGAIN
from twotower_bench.summary import CellSummary
from twotower_spec.config import check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.statistics import FEWEST_ROUNDS, Comparison, compare_same_repeats

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
    point: CellSummary
    no_speculation: CellSummary
    comparison: Comparison | None
    runners_up: tuple[CellSummary, ...]
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


def front_of(summaries: Sequence[CellSummary]) -> list[CellSummary]:
    """The Pareto front: what no other beats both in tokens/s of all and in those of one user; slowest first."""
    known = [one for one in summaries if one.system.name != BASELINE_AGAIN]
    return [known[i] for i in pareto_front([(one.tokens_per_s.value, one.user_tokens_per_s.value) for one in known])]


def recommend(summaries: Sequence[CellSummary], goal: Goal) -> Recommendation:
    """The best for a goal; no speculation where nothing is faster than it beyond the noise.

    Args:
        summaries: of a sweep, of one kind of prompts and temperature, with those of no speculation, twice.
        goal: what is wanted.

    Raises:
        ArgumentError: no speculation was not measured there.
    """
    points = [one for one in summaries if goal.concurrency in (None, one.load.concurrency)]
    if not any(one.system.name == BASELINE for one in points):
        known = ", ".join(map(str, sorted({one.load.concurrency for one in summaries}))) or "none"
        where = "any concurrency" if goal.concurrency is None else f"concurrency {goal.concurrency}"
        raise ArgumentError(
            f"no speculation was not measured at {where}; known are concurrencies {known}: measure it, or ask for "
            f"one of these"
        )
    floor = goal.min_user_tokens_per_s
    reaching = [one for one in points if floor is None or one.user_tokens_per_s.value >= floor]
    if reaching:
        return _recommended(goal, points, reaching)
    closest = _recommended(Goal("latency", concurrency=goal.concurrency), points, points)
    return replace(closest, sentence=f"Nothing that was measured gives {goal}. {closest.sentence}")


def best_by_concurrency(summaries: Sequence[CellSummary]) -> list[Recommendation]:
    """Recommends what gives most tokens/s at each concurrency, smallest first; arguments as `recommend`."""
    concurrencies = sorted({one.load.concurrency for one in summaries if one.system.name == BASELINE})
    return [recommend(summaries, Goal(concurrency=number)) for number in concurrencies]


def _recommended(goal: Goal, points: Sequence[CellSummary], reaching: Sequence[CellSummary]) -> Recommendation:
    """Chooses among the points that reach the floor."""

    def speed(one: CellSummary) -> float:
        return (one.user_tokens_per_s if goal.name == "latency" else one.tokens_per_s).value

    def rates(one: CellSummary) -> Mapping[int, float]:
        return one.user_rates if goal.name == "latency" else one.rates

    ranked = sorted(reaching, key=speed, reverse=True)
    plain = [one for one in ranked if one.system.name == BASELINE]
    speculating = [one for one in ranked if one.system.name not in (BASELINE, BASELINE_AGAIN)]
    comparison, runners_up = None, []
    if not plain:
        slow = [one for one in points if one.system.name == BASELINE]
        baseline, chosen = max(slow, key=lambda one: one.user_tokens_per_s.value), speculating[0]
        why = f"no speculation does not reach that: it gives each user {baseline.user_tokens_per_s.value:.4g} at most"
    elif not speculating:
        baseline = chosen = plain[0]
        why = "nothing that speculates was measured, or reaches that"
    else:
        # The best alone is asked: of many that are no better, one looks better in the end.
        baseline = chosen = plain[0]
        best = speculating[0]
        again = [one for one in points if (one.system.name, one.load) == (BASELINE_AGAIN, baseline.load)]
        comparison = compare_same_repeats(rates(baseline), rates(best), rates(again[0])) if again else None
        against = _against(speed(best) / speed(baseline), comparison)
        verdict = comparison.verdict if comparison else None
        if speed(best) > speed(baseline) and verdict in (None, "faster"):
            doubt = "" if verdict else f"; to tell that from noise takes {FEWEST_ROUNDS} repeats and an A/A run"
            # The best of many looks better than it is.
            many = f"; it is the best of {len(speculating)}, so measure it anew to confirm"
            chosen, why = best, f"it is {against} as no speculation{doubt}{many if len(speculating) > 1 else ''}"
        else:
            noise = ", which cannot be told from noise" if verdict == "no difference" else ""
            why = f"the best that speculates, {_in_words(best)}, is {against} as that{noise}"
    if comparison:
        lowest = speed(chosen) / comparison.noise_floor
        runners_up = [one for one in speculating if one is not chosen and speed(one) >= lowest]
    sentence = f"For {goal}: {_in_words(chosen)}, because {why}."
    return Recommendation(goal, chosen, baseline, comparison, tuple(runners_up), sentence)


def _in_words(one: CellSummary) -> str:
    return (
        f"{one.system.title} at concurrency {one.load.concurrency} ({one.tokens_per_s.value:.4g} tokens/s, "
        f"{one.user_tokens_per_s.value:.4g} for each user)"
    )


def _against(ratio: float, comparison: Comparison | None) -> str:
    if comparison is None:
        return f"{ratio:.2f} times as fast"
    found = comparison.speed_up
    return (
        f"{found.value:.2f} times as fast ({comparison.interval_name} {found.low:.2f} to {found.high:.2f}, "
        f"A/A noise {comparison.noise_floor:.2f}, {comparison.num_rounds} rounds)"
    )
