"""Section of `bench serve`: servers under load."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twotower_bench.records import BASELINE, BASELINE_AGAIN, Quantiles
from twotower_bench.report.document import Axis, Line, Panel, Plot, Reference, Row, RowGroup, Section, Table
from twotower_bench.report.findings import Outcome, finding
from twotower_bench.report.reading import Measurements
from twotower_bench.report.wording import (
    as_json,
    hues_of,
    intervals_of,
    milliseconds,
    num_of,
    number,
    prompts_and_noise,
    share,
    speed_up,
    spread,
)
from twotower_bench.summary import ServerSummary, highest_within_bound, summarise_points

# Whether the loop is closed, and what its load is.
KINDS = ((True, "requests at once"), (False, "requests/s that come"))


def serve_section(measured: Measurements, name: str) -> Section:
    """Of its load points.

    Args:
        measured: with at least one.
        name: of the section.
    """
    figures = summarise_points(measured.load_points)
    outcomes = [
        Outcome(one.system, str(one.traffic), one.speed_up, one.comparison)
        for one in figures
        if one.speed_up is not None and one.system.name != BASELINE
    ]
    plots = [
        _plot(
            figures, "goodput", "Goodput", "Requests within the bound per second, median of the repeats.",
            "A server that keeps up rises with its load; where it bends, requests miss the bound.",
            "good requests/s", lambda one: one.goodput.value,
        ),
        _plot(
            figures, "end", "Time to the end of a request", "Median over requests, and of that over repeats.",
            "Lower is better; where a line turns up, requests wait for each other.",
            "seconds", lambda one: one.e2el.median,
        ),
        _plot(
            figures, "first", "Time to the first token", "99th percentile over requests, median of the repeats.",
            "Lower is better; this is what the unluckiest users see.",
            "seconds", lambda one: one.ttft.p99,
        ),
    ]  # fmt: skip
    if outcomes:
        plots.insert(0, _speed_up_plot(figures))
    return Section(
        name,
        "Servers under load",
        finding(outcomes),
        tuple(measured.origins),
        (_highest_table(figures), _speed_table(figures), _latency_table(figures)),
        tuple(plots),
        (
            f"Good requests: within {figures[0].bound}. At a given number of requests at once a faster server gives "
            f"more tokens/s; where requests come as they come, it has each done sooner, and that is its speed-up. "
            f"Nothing is compared where requests failed.",
        ),
        [as_json(one) for one in figures],
    )


def _groups(figures: Sequence[ServerSummary], row: Callable[[ServerSummary], Row]) -> tuple[RowGroup, ...]:
    groups = []
    for traffic in dict.fromkeys(one.traffic for one in figures):
        own = [one for one in figures if one.traffic == traffic]
        heading = f"{traffic}{prompts_and_noise(own[0].num_requests, own)}"
        groups.append(RowGroup(heading, tuple(map(row, own))))
    return tuple(groups)


def _speed_table(figures: Sequence[ServerSummary]) -> Table:
    def row(one: ServerSummary) -> Row:
        is_baseline = one.system.name == BASELINE
        return Row(
            (
                one.system.title,
                spread(one.requests_per_s),
                spread(one.goodput),
                _within_bound(one),
                spread(one.tokens_per_s),
                "" if is_baseline else speed_up(one.speed_up, one.comparison),
                "" if one.verdict == "-" else one.verdict,
                number(one.acceptance_length),
                "" if is_baseline else num_of(one.num_different, one.num_requests),
                str(one.num_failed),
            )
        )

    columns = (
        "System", "Requests/s", "Goodput", "Within bound", "Tokens/s", "Speed-up", "Verdict", "Acceptance length",
        "Different texts", "Failed",
    )  # fmt: skip
    note = (
        f"Medians of the repeats (quartiles). Goodput: requests within the bound per second. Within bound: the share "
        f"of requests, and that of the worst repeat where it is lower. Speed-up: over no speculation in the same "
        f"repeat, the median{intervals_of(figures)}; “no difference” where it is within the noise of no speculation "
        f"against itself. Different texts: prompts whose text is not that of no speculation."
    )
    return Table("Throughput and goodput", columns, _groups(figures, row), note)


def _within_bound(one: ServerSummary) -> str:
    middle, lowest = share(one.good_share), share(one.lowest_good_share)
    return f"{middle} (lowest {lowest})" if one.lowest_good_share < one.good_share and lowest != middle else middle


def _latency_table(figures: Sequence[ServerSummary]) -> Table:
    def row(one: ServerSummary) -> Row:
        return Row((one.system.title, *map(_quantiles, (one.ttft, one.tpot, one.itl, one.e2el))))

    columns = ("System", "TTFT ms", "TPOT ms", "ITL ms", "E2EL ms")
    note = (
        "Median / 99th percentile over requests, medians of the repeats. TTFT: to the first token; TPOT: per token "
        "after it; ITL: between pieces of text, which can be several tokens; E2EL: to the end."
    )
    return Table("Latency", columns, _groups(figures, row), note)


def _quantiles(one: Quantiles) -> str:
    return milliseconds(one.median, one.p99)


def _highest_table(figures: Sequence[ServerSummary]) -> Table:
    rows = []
    for system in {one.system.name: one.system for one in figures}.values():
        highest = (highest_within_bound(figures, system.name, is_closed=is_closed) for is_closed, _ in KINDS)
        rows.append(Row((system.title, *(str(one) if one else "none" for one in highest))))
    columns = ("System", "Closed loop", "Open loop")
    note = (
        "Of the loads that were measured, the highest under which 90 % of the requests or more are within the bound in "
        "every repeat."
    )
    return Table("Highest load within the bound", columns, (RowGroup("", tuple(rows)),), note)


def _plot(
    figures: Sequence[ServerSummary],
    name: str,
    title: str,
    caption: str,
    reading: str,
    label: str,
    value: Callable[[ServerSummary], float],
) -> Plot:
    panels = [
        Panel("", _axis(own, kind_label), Axis(label), _lines(own, value))
        for is_closed, kind_label in KINDS
        if (own := _of_kind(figures, is_closed))
    ]
    return Plot(name, title, caption, reading, tuple(panels))


def _speed_up_plot(figures: Sequence[ServerSummary]) -> Plot:
    known = [one for one in figures if one.speed_up is not None and not one.system.name.startswith(BASELINE)]
    panels = [
        Panel(
            "",
            _axis(own, label),
            Axis("speed-up"),
            (Reference("no speculation", 1.0), *_lines(own, lambda one: one.speed_up or 0.0, with_interval=True)),
        )
        for is_closed, label in KINDS
        if (own := _of_kind(known, is_closed))
    ]
    return Plot(
        "speed-up",
        "Speed-up against load",
        f"Tokens/s, or 1 / time to the end, over no speculation in the same repeat, the median of the repeats"
        f"{intervals_of(known)}.",
        "Above the dotted line speculation gains; the table says what is beyond the noise.",
        tuple(panels),
    )


def _of_kind(figures: Sequence[ServerSummary], is_closed: bool) -> list[ServerSummary]:
    own = [one for one in figures if one.traffic.is_closed == is_closed]
    return sorted(own, key=lambda one: one.traffic.amount)


def _axis(figures: Sequence[ServerSummary], label: str) -> Axis:
    amounts = tuple(sorted({one.traffic.amount for one in figures}))
    return Axis(label, ticks=amounts, is_logarithmic=len(amounts) > 1)


def _lines(
    figures: Sequence[ServerSummary], value: Callable[[ServerSummary], float], with_interval: bool = False
) -> tuple[Line, ...]:
    shown = [one for one in figures if one.system.name != BASELINE_AGAIN]
    lines = []
    for name, hue in hues_of([one.system for one in shown]).items():
        own = [one for one in shown if one.system.name == name]
        ends = [one.comparison.speed_up for one in own if one.comparison and with_interval]
        ends = ends if len(ends) == len(own) else []
        xs = tuple(one.traffic.amount for one in own)
        low, high = tuple(one.low for one in ends), tuple(one.high for one in ends)
        lines.append(Line(own[0].system.title, hue, xs, tuple(map(value, own)), low, high))
    return tuple(lines)
