"""Acceptance of drafts: by category of prompts, by position in the block, by confidence, and beside plain steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from twotower_bench.records import ALL_CATEGORIES, BASELINE, Load, ServingCell
from twotower_bench.summary import (
    CellSummary,
    merged_calibration,
    over_categories,
    plain_step_s,
    repeats_of,
    summarise_cells,
)
from twotower_spec.drafting.metrics import CalibrationBin

# Of a share that is shown, in one repeat, whose greedy texts are those of the next: with fewer it is noise.
FEWEST_STEPS = 5


def lightest_load(cells: Iterable[ServingCell]) -> Load:
    """The load with the lowest temperature, and of these the lowest concurrency."""
    return min((cell.load for cell in cells), key=_demand)


def summarise_categories(cells: Sequence[ServingCell]) -> list[CellSummary]:
    """Summarises the drafts of all systems that drafted, under the lightest load, by category.

    All categories together come first, if there are several. Requests of loads that hold all are taken apart: of their
    summaries only the acceptance is that of a category.

    Args:
        cells: at least one.
    """
    lowest = _demand(lightest_load(cells))
    chosen = [cell for cell in cells if _demand(cell.load) == lowest]
    whole = over_categories(chosen) or [cell for cell in chosen if cell.load.category == ALL_CATEGORIES]
    categories = list(dict.fromkeys(request.category for cell in chosen for request in cell.requests))
    parts = list(whole) if len(categories) > 1 else []
    for category in categories:
        for cell in chosen:
            own = tuple(one for one in cell.requests if one.category == category)
            if own:
                parts.append(replace(cell, load=replace(cell.load, category=category), requests=own))
    return [one for one in summarise_cells(parts) if one.acceptance.num_drafted_steps]


def well_known(one: CellSummary) -> Sequence[float]:
    """Conditional acceptance by position, up to where too few steps drafted and had accepted all before."""
    asked = one.acceptance.num_asked_by_position
    num_known = sum(count >= FEWEST_STEPS * one.num_repeats for count in asked)
    return one.acceptance.conditional_by_position[:num_known]


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


def _demand(load: Load) -> tuple[float, int]:
    return load.temperature, load.concurrency
