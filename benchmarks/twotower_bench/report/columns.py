"""Columns of tables: how a value is written and what it means, once for all tables that have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

from twotower_bench.records import BASELINE
from twotower_bench.report.document import Row, Table
from twotower_bench.report.wording import interval_names, place_of, short_title
from twotower_bench.summary import CellSummary
from twotower_spec.evaluation.statistics import Estimate


class Column(NamedTuple):
    """A column.

    Attributes:
        text: a cell from the figures of its row.
        meaning: for the note below a table; `{ends}` becomes what the ends of speed-ups are.
    """

    text: Callable[[Any], str]
    meaning: str = ""


def table(
    title: str,
    figures: Sequence[Any],
    columns: Mapping[str, Column],
    heading: Callable[[Any], str] = lambda _: "",
    note: str = "",
) -> Table:
    """A table with a row for each of some figures, and a note that says what its columns mean.

    Args:
        title: what it shows.
        figures: of the rows.
        columns: by name.
        heading: that the row of a figure stands under.
        note: what to say first.
    """
    groups: dict[str, list[Row]] = {}
    for one in figures:
        groups.setdefault(heading(one), []).append({name: column.text(one) for name, column in columns.items()})
    shown = [(name, columns[name].meaning) for name in Table(title, groups).columns]
    ends = interval_names(figures)
    meanings = [f"{name}: {meaning.format(ends=ends)}." for name, meaning in shown if meaning]
    return Table(title, groups, " ".join(filter(None, [note, *meanings])))


def pivot(title: str, cells: Iterable[tuple[str, str, str, str]], note: str, names: str = "System") -> Table:
    """A table whose columns are values, too.

    Args:
        title: what it shows.
        cells: heading, name of the row, column and text of each.
        note: what the texts mean.
        names: column of the names of rows.
    """
    groups: dict[str, dict[str, dict[str, str]]] = {}
    for heading, name, column, text in cells:
        groups.setdefault(heading, {}).setdefault(name, {names: name})[column] = text
    return Table(title, {heading: list(rows.values()) for heading, rows in groups.items()}, note)


def over_gamma(name: str, column: Column, settings: Iterable[tuple[str, str, float | None, Any]]) -> Table:
    """A column beside the confidence threshold gamma; empty where gamma does not vary.

    Args:
        name, column: what is shown.
        settings: heading, the setting without its gamma, gamma, and figures of each.
    """
    found = sorted((one for one in settings if one[2] is not None), key=lambda one: one[2] or 0.0)
    gammas = Counter(family for family, _ in {one[1:3] for one in found})
    cells = [(place, family, f"{gamma:g}", column.text(one)) for place, family, gamma, one in found]
    note = "Settings that differ in gamma, the confidence threshold, alone."
    return pivot(f"{name} over gamma", (one for one in cells if gammas[one[1]] > 1), note, "Setting")


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals; "" for None."""
    return "" if value is None else f"{value:.{digits}f}"


def times(ratio: float | None) -> str:
    """A speed-up; "" for None."""
    return "" if ratio is None else f"{ratio:.2f}×"


def share(value: float) -> str:
    """Whole per cent."""
    return f"{round(100 * value)} %"


def rate(value: float) -> str:
    """Tokens or requests per second, with three digits or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def estimate(found: Estimate | None, write: Callable[[float], str] = number, unit: str = "") -> str:
    """A value with its unit, and the ends of its interval, if it has any width; "" for None."""
    if found is None:
        return ""
    ends = f" ({write(found.low)} to {write(found.high)})" if found.has_width else ""
    return f"{write(found.value)}{unit}{ends}"


def milliseconds(*seconds: float) -> str:
    """One or several times, with slashes between."""
    return " / ".join(f"{1e3 * one:.0f}" if one >= 0.1 else f"{1e3 * one:.1f}" for one in seconds)


def place_and_noise(figures: Sequence[Any]) -> Callable[[Any], str]:
    """Headings of figures: their place, number of prompts, and A/A noise."""
    noise = {place_of(one): f"; A/A noise {one.comparison.noise_floor:.2f}×" for one in figures if one.comparison}

    def heading(one: Any) -> str:
        count, place = one.num_requests, place_of(one)
        return f"{place.title}; {count} prompt{'' if count == 1 else 's'}{noise.get(place, '')}"

    return heading


def _speed_up(one: Any) -> str:
    if one.system.name == BASELINE:
        return ""
    return estimate(one.comparison.speed_up, unit="×") if one.comparison else times(one.speed_up)


def _different(one: Any) -> str:
    is_known = one.num_different is not None and one.system.name != BASELINE
    return f"{one.num_different} of {one.num_requests}" if is_known else ""


def _drafting_share(one: CellSummary) -> str:
    assert one.round_times
    return share(1 - one.round_times.verify / sum(astuple(one.round_times)))


# Of every system that is compared with no speculation; what follows "Different texts" is of engines alone.
COLUMNS: Mapping[str, Column] = {
    "System": Column(lambda one: short_title(one.system)),
    "Tokens/s": Column(lambda one: estimate(one.tokens_per_s, rate), "median of the repeats (quartiles)"),
    "Speed-up": Column(_speed_up, "over no speculation in the same repeat, the median{ends}"),
    "Verdict": Column(
        lambda one: "" if one.verdict == "-" else one.verdict,
        "“no difference” where the speed-up is within the A/A noise, by which two runs of no speculation differ",
    ),
    "Different texts": Column(_different, "prompts whose text is not that of no speculation"),
    "TTFT ms": Column(
        lambda one: milliseconds(one.latency.first_token, one.latency.first_token_p99),
        "to the first token, median / 99th percentile",
    ),
    "ITL ms": Column(
        lambda one: milliseconds(one.latency.gap, one.latency.gap_p99), "between outputs, median / 99th percentile"
    ),
    "Acceptance length": Column(
        lambda one: estimate(one.acceptance.acceptance_length),
        "accepted drafts + 1 per step that verified drafts, with its 95 % interval over prompts; the last step of a "
        "text counts as far as the text goes",
    ),
    "Tokens / step": Column(lambda one: estimate(one.acceptance.tokens_per_step), "steps without drafts count, too"),
    "Tokens / NFE": Column(
        lambda one: number(one.tokens_per_nfe),
        "tokens of steps with drafts per denoiser pass, requests counted separately",
    ),
    "Drafts": Column(lambda one: number(one.acceptance.mean_draft_tokens, 1), "verified per step that had any"),
    "Steps with drafts": Column(lambda one: f"{one.acceptance.num_drafted_steps} of {one.acceptance.num_steps}"),
    "Extend ms": Column(
        lambda one: milliseconds(one.round_times.extend), "the context tower reads prompts and what was accepted"
    ),
    "Denoise ms": Column(lambda one: milliseconds(one.round_times.denoise), "the denoiser's passes"),
    "Host ms": Column(lambda one: milliseconds(one.round_times.host), "the rest of drafting"),
    "Verify ms": Column(lambda one: milliseconds(one.round_times.verify), "the verifier and all the rest of vLLM"),
    "Drafting share": Column(_drafting_share),
}


def columns(*names: str) -> dict[str, Column]:
    """Columns of systems, by name."""
    return {name: COLUMNS[name] for name in names}
