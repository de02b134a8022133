"""Acceptance by category of prompts and by position in the block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from twotower_bench.records import ALL_CATEGORIES, ServingCell, System
from twotower_bench.report.document import Axis, Line, Panel, Plot, Row, RowGroup, Table
from twotower_bench.report.wording import category_in_words, dodged, hues_of, interval, short_title
from twotower_bench.summary import Acceptance, acceptance_of, over_categories

# Of a share that is shown, in one repeat, whose greedy texts are those of the next: with fewer it is noise.
FEWEST_STEPS = 5


@dataclass(frozen=True)
class CategoryAcceptance:
    """What became of a system's drafts on one category of prompts.

    Attributes:
        category: in words; "all prompts" for all together.
        system: which.
        num_repeats: that it is of.
        acceptance: over all of them.
    """

    category: str
    system: System
    num_repeats: int
    acceptance: Acceptance

    @property
    def well_known(self) -> tuple[float, ...]:
        """Conditional acceptance by position, up to where too few steps drafted and had accepted all before."""
        asked = self.acceptance.num_asked_by_position
        num_known = sum(count >= FEWEST_STEPS * self.num_repeats for count in asked)
        return self.acceptance.conditional_by_position[:num_known]

    @property
    def histogram(self) -> tuple[float, ...]:
        """Share of the steps with drafts by number of accepted ones."""
        counts = self.acceptance.histogram
        return tuple(count / sum(counts) for count in counts)


Shares = tuple[CategoryAcceptance, Sequence[float]]


def acceptance_by_category(cells: Sequence[ServingCell]) -> list[CategoryAcceptance]:
    """Of all systems that drafted, at the lowest temperature and concurrency; all together first, if there are several.

    Requests of loads that hold all categories are taken apart.

    Args:
        cells: at least one.
    """
    lowest = min(map(_demand, cells))
    chosen = [cell for cell in cells if _demand(cell) == lowest]
    whole = over_categories(cells) or [cell for cell in cells if cell.load.category == ALL_CATEGORIES]
    together = [cell for cell in whole if _demand(cell) == lowest]
    categories = list(dict.fromkeys(request.category for cell in chosen for request in cell.requests))
    found = _drafted(together, category_in_words(ALL_CATEGORIES)) if len(categories) > 1 else []
    for category in categories:
        parts = (
            replace(cell, requests=tuple(one for one in cell.requests if one.category == category)) for cell in chosen
        )
        found += _drafted([part for part in parts if part.requests], category)
    return found


def _drafted(cells: Sequence[ServingCell], category: str) -> list[CategoryAcceptance]:
    """Of every system that drafted in these cells."""
    found = []
    for name, system in {cell.system.name: cell.system for cell in cells}.items():
        own = [cell for cell in cells if cell.system.name == name]
        acceptance = acceptance_of([request for cell in own for request in cell.requests])
        if acceptance.num_drafted_steps:
            found.append(CategoryAcceptance(category, system, len({cell.repeat for cell in own}), acceptance))
    return found


def demand_in_words(cells: Sequence[ServingCell]) -> str:
    """The load that `acceptance_by_category` is of."""
    temperature, concurrency = min(map(_demand, cells))
    return f"{concurrency} at once" + (f", temperature {temperature:g}" if temperature else "")


def category_table(found: Sequence[CategoryAcceptance], where: str) -> Table:
    """Acceptance lengths, categories side by side.

    Args:
        found: at least one.
        where: the load, in words.
    """
    categories = list(dict.fromkeys(one.category for one in found))
    lengths = {(short_title(one.system), one.category): interval(one.acceptance.acceptance_length) for one in found}
    titles = dict.fromkeys(title for title, _ in lengths)
    rows = tuple(Row((title, *(lengths.get((title, category), "") for category in categories))) for title in titles)
    note = f"Accepted drafts + 1 per step that verified drafts, with its 95 % interval over prompts; {where}."
    return Table("Acceptance length by category", ("System", *categories), (RowGroup("", rows),), note)


def position_tables(found: Sequence[CategoryAcceptance], where: str) -> list[Table]:
    """Acceptance by position, the same among the drafts that were reached, and the histogram; as `category_table`.

    The second is left out where nothing is known well enough.
    """
    of_drafted = f"Share of the steps with drafts; {where}."
    of_reached = (
        f"Share of the steps that drafted there and accepted all drafts before; empty where fewer than {FEWEST_STEPS} "
        f"steps of a repeat did; {where}."
    )
    tables = (
        _table("Accepted at each position", [(one, one.acceptance.by_position) for one in found], 1, of_drafted),
        _table("Accepted at each position that was reached", _well_known(found), 1, of_reached),
        _table("Accepted drafts per step", [(one, one.histogram) for one in found], 0, of_drafted),
    )
    return [table for table in tables if table.groups]


def position_plots(found: Sequence[CategoryAcceptance], where: str) -> list[Plot]:
    """Both by position, a panel for each category; as `position_tables`."""
    plots = (
        _plot(
            "position",
            "Acceptance by position",
            f"Share of the steps with drafts that accepted the draft at each position; {where}.",
            "The sum over positions is the number of drafts that a step gains.",
            [(one, one.acceptance.by_position) for one in found],
        ),
        _plot(
            "conditional",
            "Acceptance by position, where it was reached",
            f"Among the steps that drafted there and accepted all drafts before; {where}. Positions that fewer than "
            f"{FEWEST_STEPS} steps of a repeat reached are left out.",
            "Where a line falls, late drafts are worse than early ones; where it stays level, longer blocks can gain.",
            _well_known(found),
        ),
    )
    return [plot for plot in plots if plot.panels]


def category_plot(found: Sequence[CategoryAcceptance], where: str) -> Plot:
    """Acceptance lengths with intervals; as `category_table`."""
    categories = tuple(dict.fromkeys(one.category for one in found))
    hues = hues_of([one.system for one in found])
    marks = tuple(
        _lengths([one for one in found if one.system.name == name], categories, hue, dodged(index, len(hues)))
        for index, (name, hue) in enumerate(hues.items())
    )
    return Plot(
        "category",
        "Acceptance length by category",
        f"Accepted drafts + 1 per step that verified drafts, with 95 % intervals over prompts; {where}.",
        "Higher is better; what the drafts cost is in the time of a round.",
        (Panel("", Axis("", names=categories), Axis("tokens per step with drafts"), marks),),
    )


def _demand(cell: ServingCell) -> tuple[float, int]:
    return cell.load.temperature, cell.load.concurrency


def _lengths(own: Sequence[CategoryAcceptance], categories: Sequence[str], hue: int, place: float) -> Line:
    pairs = [(one.category, one.acceptance.acceptance_length) for one in own]
    known = [(categories.index(category) + place, length) for category, length in pairs if length]
    return Line(
        own[0].system.title,
        hue,
        tuple(x for x, _ in known),
        tuple(length.value for _, length in known),
        tuple(length.low for _, length in known),
        tuple(length.high for _, length in known),
        is_connected=False,
    )


def _well_known(found: Sequence[CategoryAcceptance]) -> list[Shares]:
    """Conditional acceptance of those that have any that is well known."""
    return [(one, one.well_known) for one in found if one.well_known]


def _table(title: str, found: Sequence[Shares], first: int, note: str) -> Table:
    """Shares side by side; `first` is the number of the first."""
    most = max((len(shares) for _, shares in found), default=0)
    groups = []
    for category in dict.fromkeys(one.category for one, _ in found):
        rows = (
            Row((short_title(one.system), *(f"{share:.2f}" for share in shares), *[""] * (most - len(shares))))
            for one, shares in found
            if one.category == category
        )
        groups.append(RowGroup(category, tuple(rows)))
    return Table(title, ("System", *(str(first + i) for i in range(most))), tuple(groups), note)


def _plot(name: str, title: str, caption: str, reading: str, found: Sequence[Shares]) -> Plot:
    hues = hues_of([one.system for one, _ in found])
    axes = (Axis("position in the block"), Axis("share accepted", limits=(0, 1.03)))
    panels = []
    for category in dict.fromkeys(one.category for one, _ in found):
        lines = (
            Line(one.system.title, hues[one.system.name], tuple(range(1, len(shares) + 1)), tuple(shares))
            for one, shares in found
            if one.category == category
        )
        panels.append(Panel(category, *axes, tuple(lines)))
    return Plot(name, title, caption, reading, tuple(panels))
