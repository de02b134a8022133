"""Section of `bench serve`: servers under load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from twotower_bench.records import BASELINE, BASELINE_AGAIN
from twotower_bench.report.columns import (
    COMPARED,
    Column,
    estimate,
    number,
    place_and_noise,
    quantiles,
    rate,
    share,
    table,
)
from twotower_bench.report.document import Plot, Section
from twotower_bench.report.findings import finding, places_of, remarks
from twotower_bench.report.plots import Point, line_panels, set_loads
from twotower_bench.report.reading import Measurements
from twotower_bench.report.speed import AMOUNTS, speed_up_plot
from twotower_bench.report.wording import hues_of, kind_of
from twotower_bench.summary import ServerSummary, highest_within_bound, summarise_points

TIMES = "median / 99th percentile over requests, medians of the repeats"


def _within_bound(one: ServerSummary) -> str:
    middle, lowest = share(one.good_share), share(one.lowest_good_share)
    return f"{middle} (lowest {lowest})" if one.lowest_good_share < one.good_share and lowest != middle else middle


SPEED: Mapping[str, Column] = {
    "System": COMPARED["System"],
    "Requests/s": Column(lambda one: estimate(one.requests_per_s, rate)),
    "Goodput": Column(lambda one: estimate(one.goodput, rate), "requests within the bound per second"),
    "Within bound": Column(_within_bound, "share of the requests, and that of the worst repeat where it is lower"),
    "Tokens/s": COMPARED["Tokens/s"],
    "Speed-up": COMPARED["Speed-up"],
    "Verdict": COMPARED["Verdict"],
    "Acceptance length": Column(lambda one: number(one.acceptance_length)),
    "Different texts": COMPARED["Different texts"],
    "Failed": Column(lambda one: str(one.num_failed)),
}
LATENCY: Mapping[str, Column] = {
    "System": COMPARED["System"],
    "TTFT ms": Column(lambda one: quantiles(one.ttft), f"to the first token, {TIMES}"),
    "TPOT ms": Column(lambda one: quantiles(one.tpot), "per token after it"),
    "ITL ms": Column(lambda one: quantiles(one.itl), "between pieces of text, which can be several tokens"),
    "E2EL ms": Column(lambda one: quantiles(one.e2el), "to the end"),
}


def serve_section(measured: Measurements, name: str) -> Section:
    """A section of load points.

    Args:
        measured: with at least one.
        name: of the section.
    """
    summaries = summarise_points(measured.load_points)
    places = places_of(summaries)
    known = [one for one in summaries if not one.system.name.startswith(BASELINE)]
    systems = {one.system.name: one for one in summaries}.values()
    bound = (
        "The highest of the measured loads under which 90 % of the requests or more are within the bound in every "
        "repeat."
    )
    return Section(
        name,
        "Servers under load",
        finding(places),
        [
            *remarks(places),
            f"Good requests: within {summaries[0].bound}. At a given number of requests at once a faster server gives "
            f"more tokens/s; where requests come as they come, it has each done sooner, and that is its speed-up. "
            f"Nothing is compared where requests failed.",
        ],
        [
            table("Highest load within the bound", list(systems), _highest(summaries), note=bound),
            table("Throughput and goodput", summaries, SPEED, place_and_noise(summaries)),
            table("Latency", summaries, LATENCY, place_and_noise(summaries)),
        ],
        [
            speed_up_plot(known, "Tokens/s, or 1 / time to the end,"),
            _plot(
                summaries, "goodput", "Goodput", "good requests/s", lambda one: one.goodput.value,
                "Requests within the bound per second, median of the repeats. A server that keeps up rises with its "
                "load; where it bends, requests miss the bound.",
            ),
            _plot(
                summaries, "end", "Time to the end of a request", "seconds", lambda one: one.e2el.median,
                "Median over requests, and of that over repeats. Lower is better; where a line turns up, requests wait "
                "for each other.",
            ),
            _plot(
                summaries, "first", "Time to the first token", "seconds", lambda one: one.ttft.p99,
                "99th percentile over requests, median of the repeats. Lower is better; this is what the unluckiest "
                "users see.",
            ),
        ],
        summaries,
        measured.origins,
    )  # fmt: skip


def _highest(summaries: Sequence[ServerSummary]) -> dict[str, Column]:
    def column(*, is_closed: bool) -> Column:
        return Column(lambda one: str(highest_within_bound(summaries, one.system.name, is_closed=is_closed) or "none"))

    return {
        "System": COMPARED["System"],
        "Closed loop": column(is_closed=True),
        "Open loop": column(is_closed=False),
    }


def _plot(
    summaries: Sequence[ServerSummary],
    name: str,
    title: str,
    label: str,
    value: Callable[[ServerSummary], float],
    caption: str,
) -> Plot:
    shown = [one for one in summaries if one.system.name != BASELINE_AGAIN]
    ranked = sorted(shown, key=lambda one: (not one.traffic.is_closed, one.traffic.amount))
    points = [Point(kind_of(one), one.system.title, one.traffic.amount, value(one)) for one in ranked]
    panels = line_panels(points, hues_of(one.system for one in summaries), "", label)
    for kind, axes in zip(dict.fromkeys(map(kind_of, ranked)), panels, strict=True):
        axes.set_xlabel(AMOUNTS.get(kind, "requests at once"))
        set_loads(axes, [one.traffic.amount for one in ranked if kind_of(one) == kind])
    return Plot(name, title, caption, panels)
