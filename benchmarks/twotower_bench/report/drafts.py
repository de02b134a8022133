"""Section on drafts: acceptance by category and position, the time of a round, and how true confidences are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from twotower_bench.draft_summary import (
    FEWEST_STEPS,
    CategorySummary,
    calibration_by_system,
    lightest_load,
    plain_step_under,
    summarise_categories,
)
from twotower_bench.records import EXPECTED_WITHOUT_DRAFTS, ServingCell
from twotower_bench.report.columns import PHASES, Column, columns, estimate, number, phases_of, pivot, table
from twotower_bench.report.document import Plot, Table
from twotower_bench.report.plots import Point, line_panels, stacked_bars
from twotower_bench.report.wording import category_in_words, hues_of, listed, load_in_words, place_of, short_title
from twotower_bench.summary import CellSummary

PLAIN = "plain step"
# Of the phases of a round, and a plain step.
HUES = (1, 2, 4, 3, 0)
MOST_BARS = 16
# Systems whose confidences are shown apart.
MOST_SYSTEMS = 3
ROUNDS = columns("System", "Extend ms", "Denoise ms", "Host ms", "Verify ms", "Drafting share")
CALIBRATION: Mapping[str, Column] = {
    "Confidence": Column(lambda pair: f"{pair[1].low:.2f} to {pair[1].high:.2f}"),
    "Drafts": Column(
        lambda pair: str(pair[1].num_drafts), "those that were decided on: all to their left were accepted"
    ),
    "Mean confidence": Column(lambda pair: number(pair[1].mean_confidence)),
    "Accepted": Column(lambda pair: number(pair[1].acceptance_rate)),
    "Difference": Column(lambda pair: f"{pair[1].acceptance_rate - pair[1].mean_confidence:+.2f}"),
}


def draft_parts(
    cells: Sequence[ServingCell],
    summaries: Sequence[CellSummary],
    shown: Collection[str] | None = None,
    in_bars: Sequence[CellSummary] | None = None,
) -> tuple[list[Table], list[Plot]]:
    """Tables and plots of drafts.

    Args:
        cells: as measured.
        summaries: in the order of tables.
        shown: names of systems whose acceptance by position and time of a round are told; None for all.
        in_bars: of `summaries`, what the plot of rounds shows; None for those of `shown`.
    """
    by_category = summarise_categories(cells)
    own = [one for one in by_category if shown is None or one.system.name in shown]
    timed = [one for one in summaries if one.round_times and (shown is None or one.system.name in shown)]
    bins = calibration_by_system(as_measured(summaries, cells), MOST_SYSTEMS)
    where = load_in_words(lightest_load(cells)).partition(", ")[2]
    of_drafts = f"Share of the steps with drafts; {where}."
    lengths = (
        ("", short_title(one.system), category_in_words(one.category), estimate(one.acceptance.acceptance_length))
        for one in by_category
    )
    of_lengths = f"Accepted drafts + 1 per step that verified drafts, with its 95 % interval over prompts; {where}."
    of_reached = (
        f"Share of the steps that drafted there and accepted all drafts before, where {FEWEST_STEPS} steps of a repeat "
        f"or more did; {where}. Where it falls, late drafts are worse than early ones; where it stays level, longer "
        f"blocks can gain."
    )
    rounds = "Means per round of the whole batch, prompts included, which add up to its wall time."
    pairs = [(title, one) for title, found in bins.items() for one in found]
    tables = [
        pivot("Acceptance length by category", lengths, of_lengths),
        _shares("Accepted at each position", own, "by_position", of_drafts),
        _shares("Accepted at each position that was reached", own, "well_known", of_reached),
        _shares("Accepted drafts per step", own, "histogram", of_drafts, first=0),
        table("Time of a round", timed, ROUNDS, lambda one: place_of(one).title, rounds),
        table("Confidence and acceptance", pairs, CALIBRATION, lambda pair: pair[0], "All loads together."),
    ]
    return tables, [_position_plot(own, of_drafts), _round_plot(timed if in_bars is None else in_bars, cells)]


def as_measured(summaries: Sequence[CellSummary], cells: Sequence[ServingCell]) -> list[CellSummary]:
    """Summaries of loads that cells have; those over several loads, which would count all twice, are left out."""
    loads = {cell.load for cell in cells}
    return [one for one in summaries if one.load in loads]


def without_drafts_notes(cells: Sequence[ServingCell], summaries: Sequence[CellSummary]) -> list[str]:
    """A sentence on rounds that had no drafts for reasons that nobody asked for; none where there were none."""
    counts = Counter[str]()
    for one in as_measured(summaries, cells):
        counts.update(one.without_drafts)
    odd = [(reason, count) for reason, count in counts.most_common() if reason not in EXPECTED_WITHOUT_DRAFTS and count]
    if not odd:
        return []
    reasons = listed([f"{reason}: {count}" for reason, count in odd])
    return [
        f"Some requests went without drafts although their prompts had been read and neither policy nor limit forbade "
        f"it ({reasons}); TwoTower's figures are not what its drafts could give."
    ]


def _shares(title: str, found: Sequence[CategorySummary], name: str, note: str, first: int = 1) -> Table:
    """Shares of that name side by side, categories apart; `first` is the number of the first."""
    cells = (
        (category_in_words(one.category), short_title(one.system), str(place), number(value))
        for one in found
        for place, value in enumerate(getattr(one, name), start=first)
    )
    return pivot(title, cells, note)


def _position_plot(found: Sequence[CategorySummary], of_drafts: str) -> Plot:
    """Acceptance by position as lines, a panel for each category."""

    def decorate(_: str, axes: Axes) -> None:
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    points = [
        Point(category_in_words(one.category), one.system.title, place, share)
        for one in found
        for place, share in enumerate(one.by_position, start=1)
    ]
    panels = line_panels(points, hues_of(one.system for one in found), "position", "share accepted", (), decorate)
    caption = f"{of_drafts} The sum over positions is the number of drafts that a step gains."
    return Plot("position", "Acceptance by position", caption, panels)


def _round_plot(summaries: Sequence[CellSummary], cells: Sequence[ServingCell]) -> Plot:
    """Phases of a round as stacked bars, beside a step without speculation under each load; the first loads."""
    timed = [one for one in summaries if one.round_times]
    bars: dict[str, Mapping[str, float]] = {}
    for load in dict.fromkeys(one.load for one in timed):
        place = load_in_words(load).replace(" at once", "")
        if plain := plain_step_under(cells, load):
            bars[f"{place}: plain"] = {PLAIN: plain}
        bars |= {f"{place}: {one.system.name}": phases_of(one) for one in timed if one.load == load}
    names = list(bars)[:MOST_BARS]
    layers = {layer: [1e3 * bars[name].get(layer, 0.0) for name in names] for layer in (*PHASES, PLAIN)}
    caption = (
        "Means per round of the batch, prompts included, beside a plain step, which is one without speculation under "
        "the same load. A round pays where it gains more tokens than the plain steps that would fit into it."
    )
    panels = [stacked_bars(names, layers, HUES, "milliseconds")] if names else []
    return Plot("rounds", "Time of a round", caption, panels)
