"""Where the time of a drafting round goes, and how far the drafter's confidences can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from twotower_bench.records import ALL_CATEGORIES, BASELINE, Load, ServingCell
from twotower_bench.report.document import Axis, Bars, Line, Panel, Plot, Reference, Row, RowGroup, Table
from twotower_bench.report.wording import (
    BLUE,
    groups_by_load,
    hues_of,
    milliseconds,
    number,
    place_of,
    share,
    short_title,
)
from twotower_bench.summary import CellSummary, merged_calibration, plain_step_s, repeats_of
from twotower_spec.drafting.metrics import CalibrationBin

# Of the bars, with their hues.
LAYERS = (("extend", 1), ("denoise", 2), ("host", 4), ("verify", 3), ("step without speculation", 0))
MOST_BARS = 16


def round_table(figures: Sequence[CellSummary]) -> Table:
    """Phases of a round of the systems with a drafter that is timed."""
    timed = [one for one in figures if one.round_times]
    rows = []
    for one in timed:
        phases = _phases(one)
        drafting = sum(phases[:3])
        rows.append(Row((short_title(one.system), *map(milliseconds, phases), share(drafting / sum(phases)))))
    columns = ("System", "Extend ms", "Denoise ms", "Host ms", "Verify ms", "Drafting share")
    note = (
        "Means per round of the whole batch, prompts included, which add up to its wall time. Extend: the context "
        "tower reads prompts and what was accepted. Denoise: the denoiser's passes. Host: the rest of drafting. "
        "Verify: the verifier and all the rest of vLLM."
    )
    return Table("Time of a round", columns, groups_by_load(timed, rows), note)


def round_plot(figures: Sequence[CellSummary], cells: Sequence[ServingCell]) -> Plot:
    """The same as stacked bars, with a step without speculation beside each load; the first loads.

    Args:
        figures: of systems with a drafter; those that are not timed are left out.
        cells: as measured, with those of no speculation.
    """
    bars: list[tuple[str, tuple[float, ...]]] = []
    for load in dict.fromkeys(one.load for one in figures if one.round_times):
        own = [one for one in figures if one.load == load]
        place = place_of(load).replace(" at once", "")
        plain = _plain_cells(cells, load)
        bars += [(f"{place}: plain", (0, 0, 0, 0, plain_step_s(plain)))] if plain else []
        bars += [(f"{place}: {one.system.name}", (*_phases(one), 0)) for one in own if one.round_times]
    bars = bars[:MOST_BARS]
    marks = tuple(Bars(name, hue, tuple(1e3 * row[i] for _, row in bars)) for i, (name, hue) in enumerate(LAYERS))
    return Plot(
        "rounds",
        "Time of a round",
        "Means per round of the batch, prompts included, beside a step without speculation under the same load.",
        "A round pays where it gains more tokens than the plain steps that would fit into it.",
        (Panel("", Axis("milliseconds"), Axis("", names=tuple(name for name, _ in bars)), marks),),
    )


def calibration_table(figures: Sequence[CellSummary]) -> Table:
    """How often drafts of a confidence are accepted, all loads together."""
    groups = []
    for title, bins in _by_system(figures).items():
        rows = (
            Row(
                (
                    f"{one.low:.2f} to {one.high:.2f}",
                    str(one.num_drafts),
                    number(one.mean_confidence),
                    number(one.acceptance_rate),
                    f"{one.acceptance_rate - one.mean_confidence:+.2f}",
                )
            )
            for one in bins
        )
        groups.append(RowGroup(title, tuple(rows)))
    columns = ("Confidence", "Drafts", "Mean confidence", "Accepted", "Difference")
    note = "Of the drafts that were decided on: all to their left had been accepted. All loads together."
    return Table("Confidence and acceptance", columns, tuple(groups), note)


def reliability_plot(figures: Sequence[CellSummary]) -> Plot:
    """The same as a diagram."""
    by_system = _by_system(figures)
    names = {one.system.title: one.system for one in figures}
    hues = hues_of([names[title] for title in by_system if title in names])
    marks: list[Line | Reference] = [Reference("as often as confident")]
    for title, bins in by_system.items():
        largest = max(one.num_drafts for one in bins)
        marks.append(
            Line(
                title,
                hues[names[title].name] if title in names else BLUE,
                tuple(one.mean_confidence for one in bins),
                tuple(one.acceptance_rate for one in bins),
                weights=tuple(one.num_drafts / largest for one in bins),
            )
        )
    axes = (Axis("mean confidence", limits=(0, 1.03)), Axis("share accepted", limits=(0, 1.03)))
    return Plot(
        "reliability",
        "Reliability of TwoTower's confidences",
        "Drafts by confidence, all loads together; larger markers stand for more drafts.",
        "Below the diagonal drafts are accepted less often than their confidence says, above it more often.",
        (Panel("", *axes, tuple(marks)),),
    )


def _plain_cells(cells: Sequence[ServingCell], load: Load) -> list[ServingCell]:
    """Of no speculation under a load, or in its categories one by one, whose batches were full each for itself."""
    return repeats_of(cells, BASELINE, load) or [
        cell for cell in cells if cell.system.name == BASELINE and replace(cell.load, category=ALL_CATEGORIES) == load
    ]


def _phases(one: CellSummary) -> tuple[float, float, float, float]:
    assert one.round_times is not None
    return one.round_times.extend, one.round_times.denoise, one.round_times.host, one.round_times.verify


def _by_system(figures: Sequence[CellSummary], most: int = 3) -> dict[str, list[CalibrationBin]]:
    """Bins that hold drafts by title of the system; more systems than `most` are taken together."""
    titles = list(dict.fromkeys(one.system.title for one in figures if one.calibration))
    parts = {title: [one.calibration for one in figures if one.system.title == title] for title in titles}
    if len(titles) > most:
        parts = {f"all {len(titles)} settings": [one.calibration for one in figures]}
    merged = {title: [one for one in merged_calibration(bins) if one.num_drafts] for title, bins in parts.items()}
    return {title: bins for title, bins in merged.items() if bins}
