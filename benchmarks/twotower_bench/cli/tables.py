"""Summaries for a terminal of 80 columns: a row for each system, under the place where it was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from twotower_bench.measurement_file import MeasurementFile
from twotower_bench.records import BASELINE, EXPECTED_WITHOUT_DRAFTS, ServingCell
from twotower_bench.summary import GOOD_ENOUGH, CellSummary, ServerSummary, Summary, highest_within_bound
from twotower_spec.machine import commit, describe_machine

# What a column says of an item, by heading.
Columns = dict[str, Callable[[Any], str]]


def table(
    items: Iterable[Any],
    columns: Columns,
    *,
    title: str | None = None,
    caption: str | None = None,
    place: Callable[[Any], object] | None = None,
    is_bold: Callable[[Any], bool] = lambda item: False,
) -> Table:
    """A table with a row for each item; words to the left, numbers to the right.

    Args:
        items: of the rows.
        columns: the first has words; so has one that is called "verdict".
        title, caption: above and below.
        place: that items stand under; None for all in one.
        is_bold: which rows stand out.
    """
    # The box itself puts a space between columns; with places more would not fit a terminal of 80.
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 0 if place else 1, 0, 0), pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    for i, heading in enumerate(columns):
        has_words = not i or heading == "verdict"
        # Rather two lines than a heading cut off.
        table.add_column(heading, justify="left" if has_words else "right", overflow="fold")
        table.columns[-1].no_wrap = has_words and place is not None
    groups: dict[object, list[Any]] = {}
    for item in items:
        groups.setdefault(place(item) if place else None, []).append(item)
    for name, group in groups.items():
        if place:
            table.add_section()
            table.add_row(str(name), style="bold")
        for item in group:
            table.add_row(*(say(item) for say in columns.values()), style="bold" if is_bold(item) else "")
    return table


def speed_table(summaries: Sequence[CellSummary]) -> Table:
    """Tokens per second and latency."""
    columns: Columns = {
        "system": _title,
        "tok/s": lambda one: f"{one.tokens_per_s.value:.0f}",
        "speed-up": _speed_up,
        "verdict": lambda one: one.verdict,
        "TTFT ms": lambda one: f"{1e3 * one.latency.first_token:.0f} / {1e3 * one.latency.first_token_p99:.0f}",
        "ITL ms": lambda one: f"{1e3 * one.latency.gap:.0f} / {1e3 * one.latency.gap_p99:.0f}",
        "differ": lambda one: _known(one.num_different),
    }
    caption = "TTFT, ITL: median / 99th percentile. differ: prompts with another text than without speculation."
    return table(summaries, columns, caption=caption, place=_place)


def acceptance_table(summaries: Sequence[CellSummary]) -> Table:
    """Table of how many drafts were accepted and where a round's time goes; systems without drafts are left out."""

    def phase(name: str) -> Callable[[CellSummary], str]:
        return lambda one: f"{1e3 * getattr(one.round_times, name):.1f}" if one.round_times else "-"

    columns: Columns = {
        "system": _title,
        "accept. length": lambda one: str(one.acceptance.acceptance_length),
        "tok / step": lambda one: f"{one.acceptance.tokens_per_step.value:.2f}",
        "tok / NFE": lambda one: _known(one.tokens_per_nfe, ".2f"),
        **{name: phase(name) for name in ("extend", "denoise", "host", "verify")},
    }
    caption = "Acceptance length: with 95 % interval over prompts. extend to verify: ms per round of the batch."
    drafted = [one for one in summaries if one.acceptance.acceptance_length]
    return table(drafted, columns, caption=caption, place=_place)


def position_table(summaries: Sequence[CellSummary]) -> Table:
    """Conditional acceptance by position."""

    def position(i: int) -> Callable[[CellSummary], str]:
        return lambda one: f"{shares[i]:.2f}" if i < len(shares := one.acceptance.conditional_by_position) else ""

    drafted = [one for one in summaries if one.acceptance.conditional_by_position]
    most = max((len(one.acceptance.conditional_by_position) for one in drafted), default=0)
    columns = {"system": _title, **{str(i + 1): position(i) for i in range(min(most, 8))}}
    caption = "Accepted at each position, of the drafts that were reached; the first 8."
    return table(drafted, columns, caption=caption, place=_place)


def throughput_table(summaries: Sequence[ServerSummary]) -> Table:
    """Rates, the speed-up, and what became of drafts and texts."""
    columns: Columns = {
        "system": _title,
        "req/s": lambda one: f"{one.requests_per_s.value:.2f}",
        "good/s": lambda one: f"{one.goodput.value:.2f}",
        "good": lambda one: f"{one.good_share:.0%}",
        "tok/s": lambda one: f"{one.tokens_per_s.value:.0f}",
        "speed-up": _speed_up,
        "verdict": lambda one: one.verdict,
        "accept": lambda one: _known(one.acceptance_length, ".2f"),
        "differ": lambda one: _known(one.num_different),
    }
    caption = "speed-up: of tokens/s at a concurrency, of the median time to the end at a rate"
    return table(summaries, columns, title="throughput", caption=caption, place=_place)


def latency_table(summaries: Sequence[ServerSummary]) -> Table:
    """All four latencies, in milliseconds."""

    def times(name: str) -> Callable[[ServerSummary], str]:
        return lambda one: " / ".join(_milliseconds(getattr(getattr(one, name), which)) for which in ("median", "p99"))

    columns = {"system": _title, **{name.upper(): times(name) for name in ("ttft", "tpot", "itl", "e2el")}}
    return table(summaries, columns, title="latency in ms, median / 99th percentile", place=_place)


def kept_loads(summaries: Sequence[ServerSummary]) -> str:
    """The highest loads that each system keeps the bound under, as a sentence."""
    parts = []
    for name, title in {one.system.name: one.system.title for one in summaries}.items():
        found = (highest_within_bound(summaries, name, is_closed=is_closed) for is_closed in (True, False))
        parts.append(f"{title}: {' and '.join(map(str, filter(None, found))) or 'none'}")
    return f"Highest load with {GOOD_ENOUGH:.0%} of the requests within {summaries[0].bound}: {'; '.join(parts)}."


def failures(summaries: Sequence[ServerSummary]) -> list[str]:
    """A sentence for every system and load with requests that failed."""
    return [
        f"{one.system.title} failed {one.num_failed} of {one.num_requests * one.num_repeats} requests at {one.traffic}."
        for one in summaries
        if one.num_failed
    ]


def left_out(num_prompts: int, cells: Sequence[ServingCell]) -> list[str]:
    """Sentences on prompts that were too long, and requests without drafts for a reason that should not be."""
    found = []
    if missing := num_prompts - len({request.prompt_id for cell in cells for request in cell.requests}):
        found.append(f"{missing} of {num_prompts} prompts were too long and are left out.")
    for cell in cells:
        reasons = cell.drafting.without_drafts if cell.drafting else {}
        odd = (f"{reason} {count}" for reason, count in reasons.items() if reason not in EXPECTED_WITHOUT_DRAFTS)
        if words := ", ".join(odd):
            where = f"{cell.system.title}, {cell.load}, repeat {cell.repeat + 1}"
            found.append(f"{where}: requests without drafts: {words}")
    return found


def print_remarks(console: Console, lines: Sequence[str], file: MeasurementFile[Any]) -> None:
    """Prints sentences under tables, then what was measured with, and how."""
    where = file.where
    vllm = next((f"vllm {v}" for name, v in where["versions"].items() if name.startswith("vllm") and v), "vllm ?")
    for line in (*lines, f"{describe_machine()}, {vllm}, commit {commit() or 'unknown'}", where["command"]):
        console.print(line, markup=False, soft_wrap=True)


def _title(one: Summary) -> str:
    return f" {one.system.title}"


def _place(one: CellSummary | ServerSummary) -> str:
    return str(one.place)


def _speed_up(one: Summary) -> str:
    return "-" if one.speed_up is None or one.system.name == BASELINE else f"{one.speed_up:.2f}x"


def _known(value: float | None, how: str = "") -> str:
    return "-" if value is None else format(value, how)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"
