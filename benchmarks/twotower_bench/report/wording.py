"""CellSummary as a reader of the report sees them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from twotower_bench.records import ALL_CATEGORIES, BASELINE, BASELINE_AGAIN, Load, System
from twotower_bench.report.document import Row, RowGroup
from twotower_bench.summary import CellSummary
from twotower_spec.evaluation.statistics import Comparison, Estimate

GREY = 0
BLUE = 1
# In every plot: no speculation is grey, TwoTower blue, and these as here; whatever else comes gets what is left.
HUES = {BASELINE: GREY, BASELINE_AGAIN: GREY, "twotower": BLUE, "draft_model": 2, "ngram": 3, "suffix": 4}


class Compared(Protocol):
    """CellSummary of a system beside no speculation."""

    @property
    def comparison(self) -> Comparison | None:
        """None with too few repeats."""


def hues_of(systems: Sequence[System]) -> dict[str, int]:
    """A hue for each system, by name."""
    names = dict.fromkeys(one.name for one in systems)
    hues = {name: HUES[name] for name in names if name in HUES}
    for name in names:
        if name not in hues:
            hues[name] = next(hue for hue in range(1, len(names) + len(HUES) + 1) if hue not in hues.values())
    return hues


def place_of(load: Load) -> str:
    """A load in words."""
    temperature = f", temperature {load.temperature:g}" if load.temperature else ""
    return f"{category_in_words(load.category)}, {load.concurrency} at once{temperature}"


def category_in_words(category: str) -> str:
    """A kind of prompts, or all."""
    return "all prompts" if category == ALL_CATEGORIES else category


def short_title(system: System) -> str:
    """Where it goes without saying that TwoTower drafts."""
    return system.title.removeprefix("TwoTower, ")


def number(value: float | None, digits: int = 2) -> str:
    """With so many decimals; "" for None."""
    return "" if value is None else f"{value:.{digits}f}"


def times(ratio: float | None) -> str:
    """A speed-up."""
    return "" if ratio is None else f"{ratio:.2f}×"


def share(value: float | None) -> str:
    """As whole per cent."""
    return "" if value is None else f"{100 * value:.0f} %"


def signed_share(value: float | None) -> str:
    """As whole per cent with its sign."""
    return "" if value is None else f"{round(100 * value):+d} %"


def rate(value: float) -> str:
    """Tokens or requests per second, with three digits or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(runs: Estimate) -> str:
    """Median, and quartiles if there were several runs."""
    quartiles = f" ({rate(runs.low)} to {rate(runs.high)})" if runs.has_width else ""
    return rate(runs.value) + quartiles


def interval(found: Estimate | None) -> str:
    """Estimate with its ends; "" for None."""
    return "" if found is None else str(found)


def milliseconds(*seconds: float) -> str:
    """One or several, with slashes."""
    return " / ".join(f"{1e3 * one:.0f}" if one >= 0.1 else f"{1e3 * one:.1f}" for one in seconds)


def speed_up(ratio: float | None, comparison: Comparison | None) -> str:
    """With its interval where there is one."""
    if comparison is None:
        return times(ratio)
    found = comparison.speed_up
    return f"{found.value:.2f}× ({found.low:.2f} to {found.high:.2f})"


def intervals_of(figures: Iterable[Compared]) -> str:
    """What the ends of their speed-ups are, in brackets after a space, as ` (95 % interval)`; "" without any."""
    names = dict.fromkeys(one.comparison.interval_name for one in figures if one.comparison)
    return f" ({' or '.join(names)})" if names else ""


def num_of(part: int | None, whole: int) -> str:
    """A count beside all; "" for None."""
    return "" if part is None else f"{part} of {whole}"


def listed(words: Sequence[str]) -> str:
    """With commas and an `and`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def slug(text: str) -> str:
    """For a file name or an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def dodged(index: int, count: int) -> float:
    """Where the marks of one of several systems stand beside a position that they share."""
    return 0.5 * (index / (count - 1) - 0.5) if count > 1 else 0.0


def groups_by_load(
    figures: Sequence[CellSummary], rows: Sequence[Row], with_noise: bool = False
) -> tuple[RowGroup, ...]:
    """Rows under the loads that they are of.

    Args:
        figures: of each row.
        rows: as many.
        with_noise: whether headings name the number of prompts and the A/A noise.
    """
    groups = []
    for load in dict.fromkeys(one.load for one in figures):
        own = [one for one in figures if one.load == load]
        heading = place_of(load) + (prompts_and_noise(own[0].num_requests, own) if with_noise else "")
        groups.append(RowGroup(heading, tuple(row for one, row in zip(figures, rows, strict=True) if one.load == load)))
    return tuple(groups)


def prompts_and_noise(num_prompts: int, figures: Iterable[Compared]) -> str:
    """What follows a load in a heading, as `; 4 prompts; A/A noise 1.10×`; figures of this load."""
    noise = next((f"; A/A noise {one.comparison.noise_floor:.2f}×" for one in figures if one.comparison), "")
    return f"; {num_prompts} prompt{'' if num_prompts == 1 else 's'}{noise}"


def as_json(figures: Any) -> dict[str, Any]:
    """A dataclass of figures with its verdict, if it has one."""
    verdict = getattr(figures, "verdict", None)
    return {**asdict(figures), **({"verdict": verdict} if verdict else {})}
