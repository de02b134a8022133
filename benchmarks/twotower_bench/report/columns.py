"""Columns of tables: how a value is written and what it means, once for all tables that have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from twotower_bench.records import BASELINE, Quantiles
from twotower_bench.report.document import Row, Table
from twotower_bench.report.wording import place_of, short_title
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
    found = Table(title, groups)
    ends = interval_names(figures)
    meanings = [
        f"{name}: {columns[name].meaning.format(ends=ends)}." for name in found.columns if columns[name].meaning
    ]
    return Table(title, groups, " ".join([*([note] if note else []), *meanings]))


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals; "" for None."""
    return "" if value is None else f"{value:.{digits}f}"


def times(ratio: float | None) -> str:
    """A speed-up; "" for None."""
    return "" if ratio is None else f"{ratio:.2f}×"


def share(value: float | None, sign: str = "") -> str:
    """Whole per cent, signed with "+" as `sign`; "" for None."""
    return "" if value is None else f"{round(100 * value):{sign}d} %"


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


def quantiles(one: Quantiles) -> str:
    """Median and 99th percentile in milliseconds."""
    return milliseconds(one.median, one.p99)


def interval_names(figures: Iterable[Any]) -> str:
    """What the ends of their speed-ups are, in brackets after a space, as ` (95 % interval)`; "" without any."""
    found = [one.comparison for one in figures if getattr(one, "comparison", None)]
    names = dict.fromkeys(one.interval_name for one in found)
    return f" ({' or '.join(names)})" if names else ""


def place_and_noise(figures: Sequence[Any]) -> Callable[[Any], str]:
    """Headings of figures: their place, number of prompts, and A/A noise."""
    noise = {place_of(one): f"; A/A noise {one.comparison.noise_floor:.2f}×" for one in figures if one.comparison}

    def heading(one: Any) -> str:
        count, place = one.num_requests, place_of(one)
        return f"{place}; {count} prompt{'' if count == 1 else 's'}{noise.get(place, '')}"

    return heading


def _speed_up(one: Any) -> str:
    if one.system.name == BASELINE:
        return ""
    return estimate(one.comparison.speed_up, unit="×") if one.comparison else times(one.speed_up)


def _different(one: Any) -> str:
    is_known = one.num_different is not None and one.system.name != BASELINE
    return f"{one.num_different} of {one.num_requests}" if is_known else ""


# Of every system that is compared with no speculation.
COMPARED: Mapping[str, Column] = {
    "System": Column(lambda one: short_title(one.system)),
    "Tokens/s": Column(lambda one: estimate(one.tokens_per_s, rate), "median of the repeats (quartiles)"),
    "Speed-up": Column(_speed_up, "over no speculation in the same repeat, the median{ends}"),
    "Verdict": Column(
        lambda one: "" if one.verdict == "-" else one.verdict,
        "“no difference” where the speed-up is within the A/A noise, by which two runs of no speculation differ",
    ),
    "Different texts": Column(_different, "prompts whose text is not that of no speculation"),
}
