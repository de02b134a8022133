"""Section of `bench acceptance`: TwoTower and its rivals in vLLM."""

from __future__ import annotations

from twotower_bench.report.columns import columns, place_and_noise, table
from twotower_bench.report.document import Section
from twotower_bench.report.drafts import draft_tables, without_drafts_notes
from twotower_bench.report.findings import finding, places_of, remarks
from twotower_bench.report.plots import speed_up_plot
from twotower_bench.report.reading import Measurements
from twotower_bench.report.wording import is_rival, place_of
from twotower_bench.summary import over_categories, summarise_cells

SPEED = columns("System", "Tokens/s", "Speed-up", "Verdict", "TTFT ms", "ITL ms", "Different texts")
GAINS = columns("System", "Acceptance length", "Tokens / step", "Tokens / NFE", "Drafts", "Steps with drafts")


def acceptance_section(measured: Measurements) -> Section:
    """Makes the section of serving cells; all categories together come first, and the finding is about them."""
    cells = measured.serving_cells
    together = over_categories(cells)
    summaries = summarise_cells([*together, *cells])
    loads = {cell.load for cell in together or cells}
    places = places_of([one for one in summaries if one.load in loads])
    drafted = [one for one in summaries if one.acceptance.acceptance_length]
    shown = [one for one in summaries if one.system.is_two_tower or is_rival(one.system)]
    repeats = " or ".join(map(str, sorted({one.num_repeats for one in summaries})))
    return Section(
        "Acceptance and speed in vLLM",
        finding(places),
        [
            *remarks(places),
            f"{repeats} repeats, systems in turn. No speculation runs twice: what its two runs differ by is the A/A "
            f"noise.",
            *without_drafts_notes(cells, summaries),
        ],
        [
            table("Speed and latency", summaries, SPEED, place_and_noise(summaries)),
            table("What drafts gain", drafted, GAINS, lambda one: place_of(one).title),
            *draft_tables(cells, summaries),
        ],
        speed_up_plot(shown),
        summaries,
    )
