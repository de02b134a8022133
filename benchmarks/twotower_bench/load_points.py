"""Figures of servers under load, over the repeats of every point."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from twotower_bench.records import BASELINE, BASELINE_AGAIN, LatencyBound, LoadPoint, Quantiles, System, Traffic
from twotower_bench.serving import in_order_of_tables
from twotower_bench.serving_figures import verdict_of
from twotower_spec.evaluation.statistics import (
    Comparison,
    Estimate,
    compare_same_repeats,
    median_and_spread,
    ratio_of_same_repeats,
)

# Of the requests of every repeat that must be within the bound for a load to count as kept.
GOOD_ENOUGH = 0.9


@dataclass(frozen=True)
class LoadFigures:
    """A system under a traffic, over all repeats.

    Attributes:
        system, traffic, bound: which.
        num_repeats, num_requests: what it rests on; requests of one repeat.
        num_failed: requests in all repeats.
        requests_per_s, goodput, tokens_per_s: over repeats.
        good_share: goodput over requests per second, those that failed included: medians of the repeats.
        lowest_good_share: of the repeat with the smallest share of requests within the bound.
        ttft, tpot, itl, e2el: medians over repeats.
        acceptance_length: accepted + 1 per draft, of all repeats together; None without drafts.
        num_different: prompts with another text than no speculation in its first repeat, in any repeat; None where
            texts are drawn or there is nothing to compare with.
        speed_up: over no speculation, the median over repeats, see `LoadPoint.speed`; None where that is missing, or
            a request of what is compared failed: a server that answers less has less to do.
        comparison: the same with its interval and the A/A noise; None with fewer than three repeats, too.
    """

    system: System
    traffic: Traffic
    bound: LatencyBound
    num_repeats: int
    num_requests: int
    num_failed: int
    requests_per_s: Estimate
    goodput: Estimate
    tokens_per_s: Estimate
    good_share: float
    lowest_good_share: float
    ttft: Quantiles
    tpot: Quantiles
    itl: Quantiles
    e2el: Quantiles
    acceptance_length: float | None
    num_different: int | None
    speed_up: float | None
    comparison: Comparison | None

    @property
    def keeps_bound(self) -> bool:
        """Whether enough of its requests are within the bound, in every repeat."""
        return self.lowest_good_share >= GOOD_ENOUGH

    @property
    def verdict(self) -> str:
        """The comparison in a few words."""
        return verdict_of(self.system, self.speed_up, self.comparison)


def load_figures(points: Sequence[LoadPoint]) -> list[LoadFigures]:
    """Of every system under every traffic: traffics as they come first, systems in the order of tables."""
    measured = {(point.traffic, point.system.name) for point in points}
    names = [system.name for system in in_order_of_tables(point.system for point in points)]
    traffics = dict.fromkeys(point.traffic for point in points)
    return [_figures(points, name, one) for one in traffics for name in names if (one, name) in measured]


def highest_within_bound(figures: Sequence[LoadFigures], system: str, *, is_closed: bool) -> Traffic | None:
    """The highest closed or open loop that a system keeps the bound under; None if it does under none."""
    kept = [
        one.traffic
        for one in figures
        if one.system.name == system and one.traffic.is_closed == is_closed and one.keeps_bound
    ]
    return max(kept, key=lambda traffic: traffic.amount, default=None)


def points_of(points: Sequence[LoadPoint], system: str, traffic: Traffic) -> list[LoadPoint]:
    """Repeats of one system under one traffic, in order."""
    found = (point for point in points if point.system.name == system and point.traffic == traffic)
    return sorted(found, key=lambda point: point.repeat)


def _figures(points: Sequence[LoadPoint], system: str, traffic: Traffic) -> LoadFigures:
    own, baseline, again = (points_of(points, name, traffic) for name in (system, BASELINE, BASELINE_AGAIN))
    num_drafts = sum(point.num_drafts for point in own)
    accepted = sum(point.num_accepted_tokens for point in own)
    times = {name: _middle([getattr(point, name) for point in own]) for name in ("ttft", "tpot", "itl", "e2el")}
    is_whole = not any(point.num_failed for point in (*own, *baseline, *again))
    speeds, plain, noise = (_speeds(one) if is_whole else {} for one in (own, baseline, again))
    goodput = median_and_spread([point.goodput for point in own])
    return LoadFigures(
        system=own[0].system,
        traffic=traffic,
        bound=own[0].bound,
        num_repeats=len(own),
        num_requests=len(own[0].texts),
        num_failed=sum(point.num_failed for point in own),
        requests_per_s=median_and_spread([point.requests_per_s for point in own]),
        goodput=goodput,
        tokens_per_s=median_and_spread([point.tokens_per_s for point in own]),
        good_share=goodput.value / statistics.median(len(point.texts) / point.seconds for point in own),
        lowest_good_share=min(point.good_share for point in own),
        **times,
        acceptance_length=1 + accepted / num_drafts if num_drafts else None,
        num_different=_num_different(own, baseline[0]) if baseline and not own[0].temperature else None,
        speed_up=ratio_of_same_repeats(speeds, plain),
        comparison=None if system == BASELINE else compare_same_repeats(plain, speeds, noise),
    )


def _middle(times: Sequence[Quantiles]) -> Quantiles:
    return Quantiles(*(statistics.median(getattr(one, name) for one in times) for name in ("median", "p99")))


def _speeds(points: Sequence[LoadPoint]) -> dict[int, float]:
    """By repeat."""
    return {point.repeat: point.speed for point in points}


def _num_different(points: Sequence[LoadPoint], expected: LoadPoint) -> int:
    pairs = ((i, text, expected.texts[i]) for point in points for i, text in enumerate(point.texts))
    return len({i for i, text, other in pairs if text is not None and other is not None and text != other})
