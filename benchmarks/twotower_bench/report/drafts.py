"""What became of drafts and what they cost, as every section on serving cells shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from twotower_bench.records import EXPECTED_WITHOUT_DRAFTS, ServingCell
from twotower_bench.report.document import Plot, Table
from twotower_bench.report.positions import (
    acceptance_by_category,
    category_plot,
    category_table,
    demand_in_words,
    position_plots,
    position_tables,
)
from twotower_bench.report.rounds import calibration_table, reliability_plot, round_plot, round_table
from twotower_bench.report.wording import listed
from twotower_bench.summary import CellSummary


def draft_parts(
    cells: Sequence[ServingCell],
    figures: Sequence[CellSummary],
    shown: Collection[str] | None = None,
    in_bars: Sequence[CellSummary] | None = None,
) -> tuple[list[Table], list[Plot]]:
    """Tables and plots: acceptance by category and position, time of a round, confidences; those that there are.

    Args:
        cells: as measured.
        figures: in the order of tables.
        shown: names of systems whose acceptance by position and time of a round are told; None for all.
        in_bars: of `figures`, what the plot of rounds shows; None for those of `shown`.
    """
    tables, plots = [], []
    where, by_category = demand_in_words(cells), acceptance_by_category(cells)
    by_position = [one for one in by_category if shown is None or one.system.name in shown]
    if by_position:
        tables += [category_table(by_category, where), *position_tables(by_position, where)]
        plots += [category_plot(by_position, where), *position_plots(by_position, where)]
    timed = [one for one in figures if one.round_times and (shown is None or one.system.name in shown)]
    if timed:
        tables.append(round_table(timed))
        plots.append(round_plot(timed if in_bars is None else in_bars, cells))
    apart = as_measured(figures, cells)
    if any(part.num_drafts for one in apart for part in one.calibration):
        tables.append(calibration_table(apart))
        plots.append(reliability_plot(apart))
    return tables, plots


def as_measured(figures: Sequence[CellSummary], cells: Sequence[ServingCell]) -> list[CellSummary]:
    """Those of loads that cells have; figures over several loads, which would count all twice, are left out."""
    loads = {cell.load for cell in cells}
    return [one for one in figures if one.load in loads]


def without_drafts_notes(cells: Sequence[ServingCell], figures: Sequence[CellSummary]) -> list[str]:
    """A sentence on rounds that had no drafts for reasons that nobody asked for; none where there were none."""
    counts = Counter[str]()
    for one in as_measured(figures, cells):
        counts.update(one.without_drafts)
    reasons = [
        f"{reason}: {count}"
        for reason, count in counts.most_common()
        if count and reason not in EXPECTED_WITHOUT_DRAFTS
    ]
    if not reasons:
        return []
    return [
        f"TwoTower's requests went without drafts in some rounds for other reasons than prompts that are still read, "
        f"the policy and the limit ({listed(reasons)}); its figures are not what its drafts could give."
    ]
