"""Tables of measured load points for a terminal of 80 columns, and the loads that keep the bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from twotower_bench.cli.tables import print_origin
from twotower_bench.measurement_file import MeasurementFile
from twotower_bench.records import LoadPoint
from twotower_bench.servers import ServePlan
from twotower_bench.summary import GOOD_ENOUGH, ServerSummary, highest_within_bound

THROUGHPUT = ("req/s", "good/s", "good", "tok/s", "speed-up", "verdict", "accept", "differ")
LATENCIES = ("TTFT", "p99", "TPOT", "p99", "ITL", "p99", "E2EL", "p99")
Cells = Callable[[ServerSummary], list[str]]


def print_load_tables(
    console: Console,
    figures: Sequence[ServerSummary],
    plan: ServePlan,
    dataset: str,
    record: MeasurementFile[LoadPoint],
) -> None:
    """Both tables, the loads that keep the bound, what was asked, and where it was measured."""
    console.print(throughput_table(figures))
    console.print(latency_table(figures))
    asked = plan.workload
    lines = (
        *failures(figures),
        kept_loads(figures),
        f"{len(asked.prompts)} prompts of {dataset}, up to {asked.max_new_tokens} new tokens, temperature "
        f"{asked.temperature:g}, {plan.num_repeats} repeats, servers {plan.mode}",
    )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    print_origin(console, record)


def throughput_table(figures: Sequence[ServerSummary]) -> Table:
    """Rates, the speed-up, and what became of drafts and texts."""
    table = _table("throughput", THROUGHPUT, figures, _throughput)
    table.caption = "speed-up: of tokens/s at a concurrency, of the median time to the end at a rate"
    return table


def latency_table(figures: Sequence[ServerSummary]) -> Table:
    """All four, in milliseconds."""
    return _table("latency in ms, median and 99th percentile", LATENCIES, figures, _latencies)


def kept_loads(figures: Sequence[ServerSummary]) -> str:
    """The highest loads that each system keeps the bound under, as a sentence."""
    titles = {one.system.name: one.system.title for one in figures}
    parts = []
    for name, title in titles.items():
        found = (highest_within_bound(figures, name, is_closed=is_closed) for is_closed in (True, False))
        parts.append(f"{title}: {' and '.join(map(str, filter(None, found))) or 'none'}")
    return f"Highest load with {GOOD_ENOUGH:.0%} of the requests within {figures[0].bound}: {'; '.join(parts)}."


def failures(figures: Sequence[ServerSummary]) -> list[str]:
    """A sentence for every system and load with requests that failed."""
    return [
        f"{one.system.title} failed {one.num_failed} of {one.num_requests * one.num_repeats} requests at {one.traffic}."
        for one in figures
        if one.num_failed
    ]


def _table(title: str, headings: Sequence[str], figures: Sequence[ServerSummary], cells: Cells) -> Table:
    # The box itself puts a space between columns; more would not fit.
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "verdict" else "right", no_wrap=True)
    for traffic in dict.fromkeys(one.traffic for one in figures):
        table.add_row(str(traffic), style="bold")
        for one in figures:
            if one.traffic == traffic:
                table.add_row(f" {one.system.title}", *cells(one))
    return table


def _throughput(one: ServerSummary) -> list[str]:
    return [
        f"{one.requests_per_s.value:.2f}",
        f"{one.goodput.value:.2f}",
        f"{one.good_share:.0%}",
        f"{one.tokens_per_s.value:.0f}",
        "-" if one.speed_up is None else f"{one.speed_up:.2f}x",
        one.verdict,
        "-" if one.acceptance_length is None else f"{one.acceptance_length:.2f}",
        "-" if one.num_different is None else f"{one.num_different}",
    ]


def _latencies(one: ServerSummary) -> list[str]:
    times = (one.ttft, one.tpot, one.itl, one.e2el)
    return [_milliseconds(seconds) for time in times for seconds in (time.median, time.p99)]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"
