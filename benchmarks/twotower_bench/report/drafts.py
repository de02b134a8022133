"""What became of drafts: acceptance by category and position, the time of a round, and how true confidences are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes

from twotower_bench.records import ALL_CATEGORIES, BASELINE, EXPECTED_WITHOUT_DRAFTS, Load, ServingCell, System
from twotower_bench.report.columns import Column, estimate, number, table
from twotower_bench.report.document import Plot, Row, Table
from twotower_bench.report.plots import Point, draw_diagonal, line_panels, stacked_bars
from twotower_bench.report.speed import PHASES, columns, phases_of
from twotower_bench.report.wording import category_in_words, hues_of, listed, load_in_words, place_of, short_title
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
PLAIN = "plain step"
# Of the phases of a round, and a plain step.
HUES = (1, 2, 4, 3, 0)
MOST_BARS = 16
# Systems whose confidences are shown apart; more are taken together.
MOST_SYSTEMS = 3

CALIBRATION: Mapping[str, Column] = {
    "Confidence": Column(lambda one: f"{one.low:.2f} to {one.high:.2f}"),
    "Drafts": Column(lambda one: str(one.num_drafts), "those that were decided on: all to their left were accepted"),
    "Mean confidence": Column(lambda one: number(one.mean_confidence)),
    "Accepted": Column(lambda one: number(one.acceptance_rate)),
    "Difference": Column(lambda one: f"{one.acceptance_rate - one.mean_confidence:+.2f}"),
}


@dataclass(frozen=True)
class CategoryAcceptance:
    """What became of a system's drafts on one category of prompts.

    Attributes:
        category: in words; "all prompts" for all together.
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


Shares = tuple[CategoryAcceptance, Sequence[float]]


def draft_parts(
    cells: Sequence[ServingCell],
    figures: Sequence[CellSummary],
    shown: Collection[str] | None = None,
    in_bars: Sequence[CellSummary] | None = None,
) -> tuple[list[Table], list[Plot]]:
    """Tables and plots of drafts.

    Args:
        cells: as measured.
        figures: in the order of tables.
        shown: names of systems whose acceptance by position and time of a round are told; None for all.
        in_bars: of `figures`, what the plot of rounds shows; None for those of `shown`.
    """
    by_category = acceptance_by_category(cells)
    chosen = [one for one in by_category if shown is None or one.system.name in shown]
    timed = [one for one in figures if one.round_times and (shown is None or one.system.name in shown)]
    by_confidence = _by_confidence(as_measured(figures, cells))
    where = load_in_words(min((cell.load for cell in cells), key=_demand)).partition(", ")[2]
    of_drafts = f"Share of the steps with drafts; {where}."
    of_reached = (
        f"Share of the steps that drafted there and accepted all drafts before, where {FEWEST_STEPS} steps of a repeat "
        f"or more did; {where}."
    )
    rounds = columns("System", "Extend ms", "Denoise ms", "Host ms", "Verify ms", "Drafting share")
    rounds_note = "Means per round of the whole batch, prompts included, which add up to its wall time."
    tables = [
        _category_table(by_category, where),
        _share_table("Accepted at each position", [(one, one.by_position) for one in chosen], 1, of_drafts),
        _share_table(
            "Accepted at each position that was reached", [(one, one.well_known) for one in chosen], 1, of_reached
        ),
        _share_table("Accepted drafts per step", [(one, one.histogram) for one in chosen], 0, of_drafts),
        table("Time of a round", timed, rounds, place_of, rounds_note),
        _calibration_table(by_confidence),
    ]
    plots = [
        _share_plot(
            "position", "Acceptance by position", [(one, one.by_position) for one in chosen],
            f"{of_drafts} The sum over positions is the number of drafts that a step gains.",
        ),
        _share_plot(
            "conditional", "Acceptance by position, where it was reached", [(one, one.well_known) for one in chosen],
            f"{of_reached} Where a line falls, late drafts are worse than early ones; where it stays level, longer "
            f"blocks can gain.",
        ),
        _round_plot(timed if in_bars is None else in_bars, cells),
        _reliability_plot(by_confidence, figures),
    ]  # fmt: skip
    return tables, plots


def as_measured(figures: Sequence[CellSummary], cells: Sequence[ServingCell]) -> list[CellSummary]:
    """Summaries of loads that cells have; those over several loads, which would count all twice, are left out."""
    loads = {cell.load for cell in cells}
    return [one for one in figures if one.load in loads]


def without_drafts_notes(cells: Sequence[ServingCell], figures: Sequence[CellSummary]) -> list[str]:
    """A sentence on rounds that had no drafts for reasons that nobody asked for; none where there were none."""
    counts = Counter[str]()
    for one in as_measured(figures, cells):
        counts.update(one.without_drafts)
    odd = [(reason, count) for reason, count in counts.most_common() if reason not in EXPECTED_WITHOUT_DRAFTS and count]
    if not odd:
        return []
    reasons = listed([f"{reason}: {count}" for reason, count in odd])
    return [
        f"Some requests went without drafts although their prompts had been read and neither policy nor limit forbade "
        f"it ({reasons}); TwoTower's figures are not what its drafts could give."
    ]


def acceptance_by_category(cells: Sequence[ServingCell]) -> list[CategoryAcceptance]:
    """Acceptance of all systems that drafted, at the lowest temperature and concurrency, by category.

    All categories together come first, if there are several. Requests of loads that hold all are taken apart.

    Args:
        cells: at least one.
    """
    lowest = min(_demand(cell.load) for cell in cells)
    chosen = [cell for cell in cells if _demand(cell.load) == lowest]
    whole = over_categories(cells) or [cell for cell in cells if cell.load.category == ALL_CATEGORIES]
    together = [cell for cell in whole if _demand(cell.load) == lowest]
    categories = list(dict.fromkeys(request.category for cell in chosen for request in cell.requests))
    found = _drafted(together, category_in_words(ALL_CATEGORIES)) if len(categories) > 1 else []
    for category in categories:
        parts = (
            replace(cell, requests=tuple(one for one in cell.requests if one.category == category)) for cell in chosen
        )
        found += _drafted([part for part in parts if part.requests], category)
    return found


def _drafted(cells: Sequence[ServingCell], category: str) -> list[CategoryAcceptance]:
    """Acceptance of every system that drafted in these cells."""
    found = []
    for name, system in {cell.system.name: cell.system for cell in cells}.items():
        own = [cell for cell in cells if cell.system.name == name]
        acceptance = acceptance_of([request for cell in own for request in cell.requests])
        if acceptance.num_drafted_steps:
            found.append(CategoryAcceptance(category, system, len({cell.repeat for cell in own}), acceptance))
    return found


def _demand(load: Load) -> tuple[float, int]:
    return load.temperature, load.concurrency


def _category_table(found: Sequence[CategoryAcceptance], where: str) -> Table:
    """Acceptance lengths, categories side by side."""
    rows: dict[str, dict[str, str]] = {}
    for one in found:
        row = rows.setdefault(one.system.name, {"System": short_title(one.system)})
        row[one.category] = estimate(one.acceptance.acceptance_length)
    note = f"Accepted drafts + 1 per step that verified drafts, with its 95 % interval over prompts; {where}."
    return Table("Acceptance length by category", {"": list(rows.values())}, note)


def _share_table(title: str, found: Sequence[Shares], first: int, note: str) -> Table:
    """Shares side by side, categories apart; `first` is the number of the first."""
    groups: dict[str, list[Row]] = {}
    for one, shares in found:
        if shares:
            texts = {str(place): number(share) for place, share in enumerate(shares, start=first)}
            groups.setdefault(one.category, []).append({"System": short_title(one.system), **texts})
    return Table(title, groups, note)


def _share_plot(name: str, title: str, found: Sequence[Shares], caption: str) -> Plot:
    """The same as lines, a panel for each category."""
    points = [
        Point(one.category, one.system.title, place, share)
        for one, shares in found
        for place, share in enumerate(shares, start=1)
    ]
    hues = hues_of(one.system for one, _ in found)
    return Plot(name, title, caption, line_panels(points, hues, "position", "share accepted", (), _to_one))


def _to_one(axes: Axes) -> None:
    axes.set_ylim(0, 1.03)


def _round_plot(figures: Sequence[CellSummary], cells: Sequence[ServingCell]) -> Plot:
    """Phases of a round as stacked bars, beside a step without speculation under each load; the first loads."""
    timed = [one for one in figures if one.round_times]
    bars: dict[str, Mapping[str, float]] = {}
    for load in dict.fromkeys(one.load for one in timed):
        place = load_in_words(load).replace(" at once", "")
        if plain := _plain_cells(cells, load):
            bars[f"{place}: plain"] = {PLAIN: plain_step_s(plain)}
        bars |= {f"{place}: {one.system.name}": phases_of(one) for one in timed if one.load == load}
    bars = dict(list(bars.items())[:MOST_BARS])
    layers = {name: [1e3 * bar.get(name, 0.0) for bar in bars.values()] for name in (*PHASES, PLAIN)}
    caption = (
        "Means per round of the batch, prompts included, beside a plain step, which is one without speculation under "
        "the same load. A round pays where it gains more tokens than the plain steps that would fit into it."
    )
    panels = [stacked_bars(list(bars), layers, HUES, "milliseconds")] if bars else []
    return Plot("rounds", "Time of a round", caption, panels)


def _plain_cells(cells: Sequence[ServingCell], load: Load) -> list[ServingCell]:
    """Cells of no speculation under a load, or in its categories, each of which had batches of its own."""
    return repeats_of(cells, BASELINE, load) or [
        cell for cell in cells if cell.system.name == BASELINE and replace(cell.load, category=ALL_CATEGORIES) == load
    ]


def _by_confidence(figures: Sequence[CellSummary]) -> dict[str, list[CalibrationBin]]:
    """Bins that hold drafts, by title of the system."""
    titles = list(dict.fromkeys(one.system.title for one in figures if one.calibration))
    parts = {title: [one.calibration for one in figures if one.system.title == title] for title in titles}
    if len(titles) > MOST_SYSTEMS:
        parts = {f"all {len(titles)} settings": [one.calibration for one in figures]}
    merged = {title: [one for one in merged_calibration(bins) if one.num_drafts] for title, bins in parts.items()}
    return {title: bins for title, bins in merged.items() if bins}


def _calibration_table(found: Mapping[str, Sequence[CalibrationBin]]) -> Table:
    """How often drafts of a confidence are accepted."""
    tables = {title: table("Confidence and acceptance", bins, CALIBRATION) for title, bins in found.items()}
    note = next((one.note for one in tables.values()), "")
    groups = {title: one.rows for title, one in tables.items()}
    return Table("Confidence and acceptance", groups, f"All loads together. {note}")


def _reliability_plot(found: Mapping[str, Sequence[CalibrationBin]], figures: Sequence[CellSummary]) -> Plot:
    """The same as a diagram."""

    def decorate(axes: Axes) -> None:
        draw_diagonal(axes, "as often as confident")
        axes.set(xlim=(0, 1.03), ylim=(0, 1.03))

    points = [
        Point("", title, one.mean_confidence, one.acceptance_rate) for title, bins in found.items() for one in bins
    ]
    hues = hues_of(one.system for one in figures)
    panels = line_panels(points, hues, "mean confidence", "share accepted", (), decorate)
    caption = "Below the diagonal drafts are accepted less often than their confidence says, above it more often."
    return Plot("reliability", "Reliability of TwoTower's confidences", caption, panels)
