"""Acceptance of drafts: by category of prompts, by position in the block, by confidence, and beside plain steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from twotower_bench.records import ALL_CATEGORIES, BASELINE, Load, ServingCell, System
from twotower_bench.summary import (
    Acceptance,
    CellSummary,
    acceptance_of,
    merged_calibration,
    over_categories,
    plain_step_s,
    repeats_of,
)
from twotower_spec.drafting.metrics import CalibrationBin

# Of a share that is shown, in one repeat, whose greedy texts are those of the next: with fewer it is noise.
FEWEST_STEPS = 5


@dataclass(frozen=True)
class CategorySummary:
    """Acceptance of a system's drafts on one category of prompts.

    Attributes:
        category: of the prompts; `ALL_CATEGORIES` for all together.
        system: that drafted.
        num_repeats: that it is of.
        acceptance: over all of them.
    """

    category: str
    system: System
    num_repeats: int
    acceptance: Acceptance

    @property
    def by_position(self) -> Sequence[float]:
        """Share of the steps with drafts that accepted the draft at each position."""
        return self.acceptance.by_position

    @property
    def well_known(self) -> Sequence[float]:
        """Conditional acceptance by position, up to where too few steps drafted and had accepted all before."""
        asked = self.acceptance.num_asked_by_position
        num_known = sum(count >= FEWEST_STEPS * self.num_repeats for count in asked)
        return self.acceptance.conditional_by_position[:num_known]

    @property
    def histogram(self) -> Sequence[float]:
        """Share of the steps with drafts by number of accepted ones."""
        counts = self.acceptance.histogram
        return [count / sum(counts) for count in counts]


def lightest_load(cells: Iterable[ServingCell]) -> Load:
    """The load with the lowest temperature, and of these the lowest concurrency."""
    return min((cell.load for cell in cells), key=_demand)


def summarise_categories(cells: Sequence[ServingCell]) -> list[CategorySummary]:
    """Summarises the drafts of all systems that drafted, under the lightest load, by category.

    All categories together come first, if there are several. Requests of loads that hold all are taken apart.

    Args:
        cells: at least one.
    """
    lowest = _demand(lightest_load(cells))
    chosen = [cell for cell in cells if _demand(cell.load) == lowest]
    whole = over_categories(cells) or [cell for cell in cells if cell.load.category == ALL_CATEGORIES]
    categories = list(dict.fromkeys(request.category for cell in chosen for request in cell.requests))
    found = []
    if len(categories) > 1:
        found += _drafted([cell for cell in whole if _demand(cell.load) == lowest], ALL_CATEGORIES)
    for category in categories:
        parts = (
            replace(cell, requests=tuple(one for one in cell.requests if one.category == category)) for cell in chosen
        )
        found += _drafted([part for part in parts if part.requests], category)
    return found


def calibration_by_system(summaries: Sequence[CellSummary], most: int) -> Mapping[str, Sequence[CalibrationBin]]:
    """Joins the bins that hold drafts over all loads, by title of the system; more systems than `most` become one."""
    titles = list(dict.fromkeys(one.system.title for one in summaries if one.calibration))
    parts = {title: [one.calibration for one in summaries if one.system.title == title] for title in titles}
    if len(titles) > most:
        parts = {f"all {len(titles)} settings": [one.calibration for one in summaries]}
    merged = {title: [one for one in merged_calibration(bins) if one.num_drafts] for title, bins in parts.items()}
    return {title: bins for title, bins in merged.items() if bins}


def plain_step_under(cells: Sequence[ServingCell], load: Load) -> float | None:
    """Seconds of a step without speculation under a load, or in its categories, each of which had its own batches.

    None where that was not measured.
    """
    plain = repeats_of(cells, BASELINE, load) or [
        cell for cell in cells if cell.system.name == BASELINE and replace(cell.load, category=ALL_CATEGORIES) == load
    ]
    return plain_step_s(plain) if plain else None


def _drafted(cells: Sequence[ServingCell], category: str) -> list[CategorySummary]:
    """Summarises every system that drafted in these cells."""
    found = []
    for name, system in {cell.system.name: cell.system for cell in cells}.items():
        own = [cell for cell in cells if cell.system.name == name]
        acceptance = acceptance_of([request for cell in own for request in cell.requests])
        if acceptance.num_drafted_steps:
            found.append(CategorySummary(category, system, len({cell.repeat for cell in own}), acceptance))
    return found


def _demand(load: Load) -> tuple[float, int]:
    return load.temperature, load.concurrency
