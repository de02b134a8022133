"""Acceptance by category of prompts and by position in the block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower_spec.evaluation.serving import ServingCell, System
from twotower_spec.evaluation.serving_figures import Acceptance, acceptance_of
from twotower_spec.report.document import Axis, Line, Panel, Plot, Row, RowGroup, Table
from twotower_spec.report.wording import dodged, hues_of, interval, short_title

# Of a share that a plot shows: with fewer its line is noise.
FEWEST_STEPS = 8


@dataclass(frozen=True)
class CategoryAcceptance:
    """What became of a system's drafts on one category of prompts."""

    category: str
    system: System
    acceptance: Acceptance


def acceptance_by_category(cells: Sequence[ServingCell]) -> list[CategoryAcceptance]:
    """Of all systems that drafted, at the lowest temperature and concurrency.

    Requests of loads that hold all categories are taken apart.

    Args:
        cells: at least one.
    """
    lowest = min(map(_demand, cells))
    chosen = [cell for cell in cells if _demand(cell) == lowest]
    found = []
    for category in dict.fromkeys(request.category for cell in chosen for request in cell.requests):
        for name, system in {cell.system.name: cell.system for cell in chosen}.items():
            own = [cell for cell in chosen if cell.system.name == name]
            requests = [one for cell in own for one in cell.requests if one.category == category]
            if any(any(one.num_draft_tokens) for one in requests):
                found.append(CategoryAcceptance(category, system, acceptance_of(requests)))
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
    """Acceptance by position, the same among the drafts that were reached, and the histogram; as `category_table`."""
    accepted = [one.acceptance for one in found]
    histograms = [[count / sum(one.histogram) for count in one.histogram] for one in accepted]
    reached = "Share of the steps that drafted there and accepted all drafts before"
    return [
        _table(
            "Accepted at each position",
            found,
            [one.by_position for one in accepted],
            1,
            f"Share of the steps with drafts; {where}.",
        ),
        _table(
            "Accepted at each position that was reached",
            found,
            [one.conditional_by_position for one in accepted],
            1,
            f"{reached}; {where}.",
        ),
        _table("Accepted drafts per step", found, histograms, 0, f"Share of the steps with drafts; {where}."),
    ]


def position_plots(found: Sequence[CategoryAcceptance], where: str) -> list[Plot]:
    """Both by position, a panel for each category; as `category_table`."""
    return [
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
            f"{FEWEST_STEPS} steps reached are left out.",
            "Where a line falls, late drafts are worse than early ones; where it stays level, longer blocks can gain.",
            [(one, _well_known(one.acceptance)) for one in found],
        ),
    ]


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
        "Where intervals do not overlap, one system's drafts are better; what they cost is in the time of a round.",
        (Panel("", Axis("", names=categories), Axis("tokens per step with drafts"), marks),),
    )


def _well_known(acceptance: Acceptance) -> tuple[float, ...]:
    """Conditional acceptance up to where too few steps came that far."""
    reached = (sum(acceptance.histogram[i:]) for i in range(len(acceptance.conditional_by_position)))
    num_known = sum(count >= FEWEST_STEPS for count in reached)
    return acceptance.conditional_by_position[:num_known]


def _demand(cell: ServingCell) -> tuple[float, int]:
    return cell.load.temperature, cell.load.concurrency


def _lengths(own: Sequence[CategoryAcceptance], categories: Sequence[str], hue: int, place: float) -> Line:
    pairs = [(one.category, one.acceptance.acceptance_length) for one in own]
    known = [(categories.index(category) + place, length) for category, length in pairs if length]
    return Line(
        own[0].system.title,
        hue,
        tuple(x for x, _ in known),
        tuple(length.estimate for _, length in known),
        tuple(length.low for _, length in known),
        tuple(length.high for _, length in known),
        is_connected=False,
    )


def _table(
    title: str, found: Sequence[CategoryAcceptance], shares: Sequence[Sequence[float]], first: int, note: str
) -> Table:
    """Shares side by side; `first` is the number of the first."""
    most = max(map(len, shares), default=0)
    groups = []
    for category in dict.fromkeys(one.category for one in found):
        own = [(one, values) for one, values in zip(found, shares, strict=True) if one.category == category]
        rows = (
            Row((short_title(one.system), *(f"{value:.2f}" for value in values), *[""] * (most - len(values))))
            for one, values in own
        )
        groups.append(RowGroup(category, tuple(rows)))
    return Table(title, ("System", *(str(first + i) for i in range(most))), tuple(groups), note)


def _plot(
    name: str, title: str, caption: str, reading: str, found: Sequence[tuple[CategoryAcceptance, Sequence[float]]]
) -> Plot:
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
