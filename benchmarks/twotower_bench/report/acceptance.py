"""Section of `bench acceptance`: TwoTower and its rivals in vLLM."""

from __future__ import annotations

from twotower_bench.records import BASELINE, BASELINE_AGAIN
from twotower_bench.report.document import Section
from twotower_bench.report.drafts import draft_parts, without_drafts_notes
from twotower_bench.report.findings import finding
from twotower_bench.report.reading import Measurements
from twotower_bench.report.speed import drafts_table, outcomes_of, speed_table, speed_up_plots
from twotower_bench.report.wording import as_json
from twotower_bench.summary import over_categories, summarise_cells


def acceptance_section(measured: Measurements, name: str) -> Section:
    """Of its serving cells; all categories together come first, and the finding is about them.

    Args:
        measured: with at least one.
        name: of the section.
    """
    cells = measured.serving_cells
    together = over_categories(cells)
    figures = summarise_cells([*together, *cells])
    loads = {cell.load for cell in together or cells}
    rivals = [one.system for one in figures if one.system.name not in (BASELINE, BASELINE_AGAIN)]
    tables, plots = draft_parts(cells, figures)
    gains = [drafts_table(figures)] if any(one.acceptance.num_drafted_steps for one in figures) else []
    repeats = sorted({one.num_repeats for one in figures})
    return Section(
        name,
        "Acceptance and speed in vLLM",
        finding(outcomes_of([one for one in figures if one.load in loads])),
        tuple(measured.origins),
        (speed_table(figures), *gains, *tables),
        (*speed_up_plots(figures, rivals), *plots),
        (
            f"{' or '.join(map(str, repeats))} repeats, systems in turn. No speculation runs twice: what its two runs "
            f"differ by is the A/A noise.",
            *without_drafts_notes(cells, figures),
        ),
        [as_json(one) for one in figures],
    )
