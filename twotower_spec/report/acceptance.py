"""Section of `bench acceptance`: TwoTower and its rivals in vLLM."""

from __future__ import annotations

from twotower_spec.evaluation.serving_figures import BASELINE, BASELINE_AGAIN, all_figures
from twotower_spec.report.document import Section
from twotower_spec.report.findings import finding
from twotower_spec.report.positions import (
    acceptance_by_category,
    category_plot,
    category_table,
    demand_in_words,
    position_plots,
    position_tables,
)
from twotower_spec.report.reading import Measurements
from twotower_spec.report.rounds import calibration_table, reliability_plot, round_plot, round_table
from twotower_spec.report.speed import drafts_table, outcomes_of, speed_table, speed_up_plots
from twotower_spec.report.wording import as_json


def acceptance_section(measured: Measurements, name: str) -> Section:
    """Of its serving cells.

    Args:
        measured: with at least one.
        name: of the section.
    """
    cells = measured.serving_cells
    figures = all_figures(cells)
    by_category, where = acceptance_by_category(cells), demand_in_words(cells)
    rivals = [one.system for one in figures if one.system.name not in (BASELINE, BASELINE_AGAIN)]
    tables, plots = [speed_table(figures)], speed_up_plots(figures, rivals)
    if by_category:
        tables += [drafts_table(figures), category_table(by_category, where), *position_tables(by_category, where)]
        plots += [category_plot(by_category, where), *position_plots(by_category, where)]
    if any(one.round_times for one in figures):
        tables.append(round_table(figures))
        plots.append(round_plot(figures))
    if any(part.num_drafts for one in figures for part in one.calibration):
        tables.append(calibration_table(figures))
        plots.append(reliability_plot(figures))
    repeats = sorted({one.num_repeats for one in figures})
    return Section(
        name,
        "Acceptance and speed in vLLM",
        finding(outcomes_of(figures)),
        tuple(measured.origins),
        tuple(tables),
        tuple(plots),
        (
            f"{' or '.join(map(str, repeats))} repeats, systems in turn. No speculation runs twice: what its two runs "
            f"differ by is the A/A noise.",
        ),
        [as_json(one) for one in figures],
    )
