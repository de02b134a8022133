"""Tables of drafts: acceptance by category and position, the time of a round, and how true confidences are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from twotower_bench.draft_summary import (
    FEWEST_STEPS,
    calibration_by_system,
    lightest_load,
    plain_step_under,
    summarise_categories,
    well_known,
)
from twotower_bench.records import EXPECTED_WITHOUT_DRAFTS, ServingCell
from twotower_bench.report.columns import Column, columns, estimate, milliseconds, number, pivot, table
from twotower_bench.report.document import Table
from twotower_bench.report.wording import category_in_words, listed, load_in_words, place_of, short_title
from twotower_bench.summary import CellSummary

# Systems whose confidences are shown apart.
MOST_SYSTEMS = 3
CALIBRATION: Mapping[str, Column] = {
    "Confidence": Column(lambda pair: f"{pair[1].low:.2f} to {pair[1].high:.2f}"),
    "Drafts": Column(
        lambda pair: str(pair[1].num_drafts), "those that were decided on: all to their left were accepted"
    ),
    "Mean confidence": Column(lambda pair: number(pair[1].mean_confidence)),
    "Accepted": Column(lambda pair: number(pair[1].acceptance_rate)),
    "Difference": Column(lambda pair: f"{pair[1].acceptance_rate - pair[1].mean_confidence:+.2f}"),
}
# Title, shares of a category, number of the first, note.
SHARES: Sequence[tuple[str, Callable[[CellSummary], Sequence[float]], int, str]] = (
    (
        *("Accepted at each position", lambda one: one.acceptance.by_position, 1),
        "Share of the steps with drafts.",
    ),
    (
        *("Accepted at each position that was reached", well_known, 1),
        f"Share of the steps that drafted there and accepted all drafts before, where {FEWEST_STEPS} steps of a repeat "
        f"or more did. Where it falls, late drafts are worse than early ones; where it stays level, longer blocks can "
        f"gain.",
    ),
    (
        *(
            "Accepted drafts per step",
            lambda one: [count / one.acceptance.num_drafted_steps for count in one.acceptance.histogram],
            0,
        ),
        "Share of the steps with drafts.",
    ),
)


def draft_tables(
    cells: Sequence[ServingCell], summaries: Sequence[CellSummary], shown: Collection[str] | None = None
) -> list[Table]:
    """Tables of drafts.

    Args:
        cells: as measured.
        summaries: in the order of tables.
        shown: names of systems whose acceptance by position and time of a round are told; None for all.
    """
    by_category = summarise_categories(cells)
    own = [one for one in by_category if shown is None or one.system.name in shown]
    timed = [one for one in summaries if one.round_times and (shown is None or one.system.name in shown)]
    bins = calibration_by_system(as_measured(summaries, cells), MOST_SYSTEMS)
    where = f"Under the lightest load: {load_in_words(lightest_load(cells)).partition(', ')[2]}."
    lengths = (
        ("", short_title(one.system), category_in_words(one.load.category), estimate(one.acceptance.acceptance_length))
        for one in by_category
    )
    of_lengths = f"Accepted drafts + 1 per step that verified drafts, with its 95 % interval over prompts. {where}"
    rounds = (
        "Means per round of the whole batch, prompts included, which add up to its wall time. A round pays where it "
        "gains more tokens than the plain steps that would fit into it."
    )
    plain = Column(
        lambda one: milliseconds(step) if (step := plain_step_under(cells, one.load)) else "",
        "a step without speculation under the same load",
    )
    names = ("System", "Extend ms", "Denoise ms", "Host ms", "Verify ms", "Drafting share")
    return [
        pivot("Acceptance length by category", lengths, of_lengths),
        *(
            pivot(
                title,
                (
                    (category_in_words(one.load.category), short_title(one.system), str(place), number(value))
                    for one in own
                    for place, value in enumerate(shares(one), start=first)
                ),
                f"{note} {where}",
            )
            for title, shares, first, note in SHARES
        ),
        table(
            "Time of a round",
            timed,
            {**columns(*names), "Plain step ms": plain},
            lambda one: place_of(one).title,
            rounds,
        ),
        table(
            "Confidence and acceptance",
            [(title, one) for title, found in bins.items() for one in found],
            CALIBRATION,
            lambda pair: pair[0],
            "All loads together.",
        ),
    ]


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
