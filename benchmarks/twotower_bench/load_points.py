"""Servers under load: what was measured at every point, and the figures of its repeats.

A point is one system under one traffic in one repeat. What a system gains is seen in another figure by kind of traffic:
in a closed loop a faster server gives more tokens per second, in an open loop requests come as they come, and a faster
server has each done sooner.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twotower_bench.serving import BASELINE, BASELINE_AGAIN, System, in_order_of_tables
from twotower_bench.serving_figures import verdict_of
from twotower_spec.config import check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.statistics import (
    Comparison,
    Spread,
    compare_same_repeats,
    median_and_spread,
    ratio_of_same_repeats,
)

# Of the requests of every repeat that must be within the bound for a load to count as kept.
GOOD_ENOUGH = 0.9


@dataclass(frozen=True)
class Traffic:
    """How requests come; exactly one of both is given.

    Attributes:
        concurrency: closed loop: so many at once, as one ends the next begins.
        request_rate: open loop: requests per second on average, at random times (Poisson), ready or not.
    """

    concurrency: int | None = None
    request_rate: float | None = None

    def __post_init__(self) -> None:
        """Checks both."""
        if (self.concurrency is None) == (self.request_rate is None):
            raise ArgumentError(
                f"concurrency {self.concurrency} with request rate {self.request_rate} is no traffic; give one of both"
            )
        if self.concurrency is not None:
            check_integer("concurrency", self.concurrency, minimum=1)
        elif not 0 < (self.request_rate or 0) < float("inf"):
            raise ArgumentError(f"request rate {self.request_rate} is not above 0; give requests per second, like 2")

    @property
    def is_closed(self) -> bool:
        """Whether requests wait for others to end."""
        return self.concurrency is not None

    @property
    def amount(self) -> float:
        """Requests at once, or per second."""
        return self.concurrency or self.request_rate or 0.0

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}" if self.is_closed else f"{self.request_rate:g} requests/s"


@dataclass(frozen=True)
class LatencyBound:
    """What a request must keep to be good, in milliseconds; None where anything will do.

    Attributes:
        ttft: time to the first token.
        tpot: time per output token after the first.
        e2el: time to the last token.
    """

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @classmethod
    def parse(cls, text: str) -> LatencyBound:
        """From `ttft:500,tpot:50`.

        Raises:
            ArgumentError: it is not like that.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition(":")
            try:
                limit = float(value)
            except ValueError:
                limit = 0.0
            if name not in cls.__dataclass_fields__ or name in limits or not 0 < limit < float("inf"):
                raise ArgumentError(
                    f"goodput bound {text!r} has {part.strip()!r}; give ttft, tpot and e2el in milliseconds, each at "
                    f"most once, like ttft:500,tpot:50"
                )
            limits[name] = limit
        return cls(**limits)

    @property
    def pairs(self) -> tuple[str, ...]:
        """What is bound, as `ttft:500`."""
        return tuple(f"{name}:{limit:g}" for name, limit in asdict(self).items() if limit is not None)

    def __str__(self) -> str:
        return ", ".join(f"{name.upper()} {limit:g} ms" for name, limit in asdict(self).items() if limit is not None)


@dataclass(frozen=True)
class Quantiles:
    """Of times, in seconds."""

    median: float
    p99: float


@dataclass(frozen=True)
class LoadPoint:
    """A system under a traffic, once.

    Attributes:
        system, traffic: which.
        repeat: counts from 0.
        bound: which requests are good.
        temperature: of the verifier.
        seconds: from the first request to the end of the last.
        num_good: requests within the bound.
        num_output_tokens: of all requests that were completed.
        ttft, tpot, e2el: over requests: to the first token, per token after it, to the last token. In a closed loop
            they begin when the request is sent, not when it began to wait for its turn.
        itl: between one piece of text and the next; with speculation a piece can be several tokens.
        num_drafts, num_accepted_tokens: as the server counted meanwhile; 0 where nothing was drafted.
        texts: by prompt; None where the request failed.
    """

    system: System
    traffic: Traffic
    repeat: int
    bound: LatencyBound
    temperature: float
    seconds: float
    num_good: int
    num_output_tokens: int
    ttft: Quantiles
    tpot: Quantiles
    itl: Quantiles
    e2el: Quantiles
    num_drafts: int
    num_accepted_tokens: int
    texts: tuple[str | None, ...]

    @property
    def num_completed(self) -> int:
        """Requests that were answered."""
        return sum(text is not None for text in self.texts)

    @property
    def num_failed(self) -> int:
        """Requests that were not."""
        return len(self.texts) - self.num_completed

    @property
    def requests_per_s(self) -> float:
        """Completed per second."""
        return self.num_completed / self.seconds

    @property
    def goodput(self) -> float:
        """Completed within the bound per second."""
        return self.num_good / self.seconds

    @property
    def good_share(self) -> float:
        """Of all requests, those within the bound."""
        return self.num_good / len(self.texts)

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return self.num_output_tokens / self.seconds

    @property
    def speed(self) -> float:
        """What systems are compared by, more is better: tokens/s in a closed loop, else 1 / median time to the end."""
        return self.tokens_per_s if self.traffic.is_closed else 1 / self.e2el.median

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> LoadPoint:
        """From what `to_json` gives; fields that it does not have are ignored."""
        values = {name: row[name] for name in cls.__dataclass_fields__}
        times = {name: Quantiles(**row[name]) for name in ("ttft", "tpot", "itl", "e2el")}
        return cls(
            **{
                **values,
                **times,
                "system": System.from_json(row["system"]),
                "traffic": Traffic(**row["traffic"]),
                "bound": LatencyBound(**row["bound"]),
                "texts": tuple(row["texts"]),
            }
        )


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
    requests_per_s: Spread
    goodput: Spread
    tokens_per_s: Spread
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
        good_share=goodput.median / statistics.median(len(point.texts) / point.seconds for point in own),
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
