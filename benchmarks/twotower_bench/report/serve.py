"""Section of `bench serve`: servers under load."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from twotower_bench.records import BASELINE, BASELINE_AGAIN
from twotower_bench.report.columns import (
    COLUMNS,
    Column,
    columns,
    estimate,
    milliseconds,
    number,
    place_and_noise,
    rate,
    share,
    table,
)
from twotower_bench.report.document import Section
from twotower_bench.report.findings import finding, places_of, remarks
from twotower_bench.report.plots import speed_up_plot
from twotower_bench.report.reading import Measurements
from twotower_bench.summary import ServerSummary, highest_within_bound, summarise_points

BOUND = (
    "The highest of the measured loads under which 90 % of the requests or more are within the bound in every repeat."
)


def _within_bound(one: ServerSummary) -> str:
    middle, lowest = share(one.good_share), share(one.lowest_good_share)
    return f"{middle} (lowest {lowest})" if one.lowest_good_share < one.good_share and lowest != middle else middle


SPEED: Mapping[str, Column] = {
    "System": COLUMNS["System"],
    "Requests/s": Column(lambda one: estimate(one.requests_per_s, rate)),
    "Goodput": Column(lambda one: estimate(one.goodput, rate), "requests within the bound per second"),
    "Within bound": Column(_within_bound, "share of the requests, and that of the worst repeat where it is lower"),
    **columns("Tokens/s", "Speed-up", "Verdict"),
    "Acceptance length": Column(lambda one: number(one.acceptance_length)),
    "Different texts": COLUMNS["Different texts"],
    "Failed": Column(lambda one: str(one.num_failed)),
}


def _latency(name: str) -> Callable[[ServerSummary], str]:
    return lambda one: milliseconds(getattr(one, name).median, getattr(one, name).p99)


LATENCY: Mapping[str, Column] = {
    "System": COLUMNS["System"],
    "TTFT ms": Column(
        _latency("ttft"), "to the first token, median / 99th percentile over requests, medians of the repeats"
    ),
    "TPOT ms": Column(_latency("tpot"), "per token after it"),
    "ITL ms": Column(_latency("itl"), "between pieces of text, which can be several tokens"),
    "E2EL ms": Column(_latency("e2el"), "to the end"),
}


def serve_section(measured: Measurements) -> Section:
    """Makes the section of load points."""
    summaries = summarise_points(measured.load_points)
    places = places_of(summaries)
    speculating = [one for one in summaries if one.system.name not in (BASELINE, BASELINE_AGAIN)]

    def highest(*, is_closed: bool) -> Column:
        return Column(lambda one: str(highest_within_bound(summaries, one.system.name, is_closed=is_closed) or "none"))

    kept = {"System": COLUMNS["System"], "Closed loop": highest(is_closed=True), "Open loop": highest(is_closed=False)}
    return Section(
        "Servers under load",
        finding(places),
        [
            *remarks(places),
            f"Good requests: within {summaries[0].bound}. At a given number of requests at once a faster server gives "
            f"more tokens/s; where requests come as they come, it has each done sooner, and that is its speed-up. "
            f"Nothing is compared where requests failed.",
        ],
        [
            table(
                "Highest load within the bound",
                [*{one.system.name: one for one in summaries}.values()],
                kept,
                note=BOUND,
            ),
            table("Throughput and goodput", summaries, SPEED, place_and_noise(summaries)),
            table("Latency", summaries, LATENCY, place_and_noise(summaries)),
        ],
        speed_up_plot(speculating, "Tokens/s, or 1 / time to the end,"),
        summaries,
    )
