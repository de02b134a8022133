"""Sections of `bench acceptance`, TwoTower and its rivals in vLLM, and of `bench sweep`, TwoTower's settings there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import get_args

from twotower_bench.recommendation import Goal, GoalName, Recommendation, best_by_concurrency, front_of, recommend
from twotower_bench.records import BASELINE, BASELINE_AGAIN, ServingCell
from twotower_bench.report.columns import COLUMNS, Column, columns, estimate, over_gamma, place_and_noise, rate, table
from twotower_bench.report.document import Section, Table
from twotower_bench.report.drafts import draft_tables, without_drafts_notes
from twotower_bench.report.findings import finding, places_of, remarks
from twotower_bench.report.plots import speed_up_plot
from twotower_bench.report.reading import Measurements
from twotower_bench.report.wording import load_in_words, place_of, short_title
from twotower_bench.summary import CellSummary, over_categories, summarise_cells

SPEED = columns("System", "Tokens/s", "Speed-up", "Verdict", "TTFT ms", "ITL ms", "Different texts")
GAINS = columns("System", "Acceptance length", "Tokens / step", "Tokens / NFE", "Drafts", "Steps with drafts")
# In the plot, which has a line for every system, and in tables by position and phase.
MOST_LINES = 7
# Named in the table of the best.
MOST_RUNNERS_UP = 3
POINT: Mapping[str, Column] = {
    "System": COLUMNS["System"],
    "Load": Column(lambda one: load_in_words(one.load)),
    "Tokens/s of all": Column(lambda one: estimate(one.tokens_per_s, rate), "median of the repeats (quartiles)"),
    "Tokens/s of one user": Column(
        lambda one: estimate(one.user_tokens_per_s, rate), "likewise, after the first token"
    ),
}


def _near(best: Recommendation) -> str:
    titles = [short_title(one.system) for one in best.runners_up]
    more = [f"{len(titles) - MOST_RUNNERS_UP} more"] if len(titles) > MOST_RUNNERS_UP else []
    return "; ".join([*titles[:MOST_RUNNERS_UP], *more]) or "none"


BEST: Mapping[str, Column] = {
    "Load": Column(lambda best: load_in_words(best.point.load)),
    "Best": Column(
        lambda best: short_title(best.point.system),
        "most tokens/s of all users together; no speculation where nothing is faster than it beyond the noise",
    ),
    "Tokens/s": Column(lambda best: estimate(best.point.tokens_per_s, rate), "median of the repeats (quartiles)"),
    "Tokens/s of one user": Column(lambda best: rate(best.point.user_tokens_per_s.value)),
    "Speed-up": Column(lambda best: COLUMNS["Speed-up"].text(best.point), COLUMNS["Speed-up"].meaning),
    "Cannot be told apart from it": Column(_near, "behind the best by no more than the A/A noise"),
}


def is_sweep(cells: Sequence[ServingCell]) -> bool:
    """Whether cells are about settings of TwoTower more than about its rivals."""
    return len({cell.system.setting for cell in cells if cell.system.setting}) > 1


def acceptance_section(measured: Measurements) -> Section:
    """Makes the section of serving cells; all categories together come first, and the finding is about them."""
    cells = measured.serving_cells
    together = over_categories(cells)
    summaries = summarise_cells([*together, *cells])
    loads = {cell.load for cell in together or cells}
    drafted = [one for one in summaries if one.acceptance.acceptance_length]
    repeats = " or ".join(map(str, sorted({one.num_repeats for one in summaries})))
    note = (
        f"{repeats} repeats, systems in turn. No speculation runs twice: what its two runs differ by is the A/A noise."
    )
    tables = [
        table("Speed and latency", summaries, SPEED, place_and_noise(summaries)),
        table("What drafts gain", drafted, GAINS, lambda one: place_of(one).title),
    ]
    compared = [one for one in summaries if one.load in loads]
    return _section("Acceptance and speed in vLLM", cells, summaries, compared, [note], tables)


def sweep_section(measured: Measurements) -> Section:
    """Makes the section of serving cells of a sweep."""
    cells = measured.serving_cells
    summaries = summarise_cells(cells)
    front, best, sentences = [], [], []
    for kind in dict.fromkeys((one.load.category, one.load.temperature) for one in summaries):
        own = [one for one in summaries if (one.load.category, one.load.temperature) == kind]
        front += front_of(own)
        best += best_by_concurrency(own)
        if any(one.system.name == BASELINE for one in own):
            sentences += [recommend(own, Goal(name)).sentence for name in get_args(GoalName)]
    two_tower = sorted((one for one in summaries if one.system.is_two_tower), key=lambda one: one.tokens_per_s.value)
    fastest = {one.load: one for one in two_tower}.values()
    # Shown one by one are rivals, the best and TwoTower's fastest at each load, and the front; a few at most.
    ranked = [
        *(one.system.name for one in summaries if not one.system.is_two_tower),
        *(one.point.system.name for one in best),
        *(one.system.name for one in fastest),
        *(one.system.name for one in reversed(front)),
    ]
    shown = list(dict.fromkeys(name for name in ranked if name not in (BASELINE, BASELINE_AGAIN)))[:MOST_LINES]
    note = (
        f"{len({one.system.name for one in two_tower})} settings. The best of many is chosen from the same runs that "
        f"its figures are of, so these are a little too good; measure a choice anew."
    )
    tables = [
        table("Best at each concurrency", best, BEST),
        table("Pareto front", front[::-1], POINT, note="What no other setting beats in both numbers."),
        _settings_table(summaries, front),
        *_gamma_tables(summaries),
    ]
    title = "Sweep over TwoTower's settings in vLLM"
    return _section(title, cells, summaries, summaries, [*sentences, note], tables, shown)


def _section(
    title: str,
    cells: Sequence[ServingCell],
    summaries: Sequence[CellSummary],
    compared: Sequence[CellSummary],
    notes: Sequence[str],
    tables: Sequence[Table],
    shown: Collection[str] | None = None,
) -> Section:
    """A section whose finding is about those that are compared; for `shown` see `draft_tables`."""
    places = places_of(compared)
    drawn = [one for one in summaries if one.system.name not in (BASELINE, BASELINE_AGAIN)]
    return Section(
        title,
        finding(places),
        [*remarks(places), *notes, *without_drafts_notes(cells, summaries)],
        [*tables, *draft_tables(cells, summaries, shown)],
        speed_up_plot(one for one in drawn if shown is None or one.system.name in shown),
        summaries,
    )


def _settings_table(summaries: Sequence[CellSummary], front: Sequence[CellSummary]) -> Table:
    """All settings, fastest first under each load, those of the front marked."""
    own = {
        "System": COLUMNS["System"],
        "Pareto": Column(lambda one: "front" if one in front else ""),
        "Tokens/s": COLUMNS["Tokens/s"],
        "Of one user": Column(lambda one: rate(one.user_tokens_per_s.value), "after the first token"),
    }
    more = ("Speed-up", "Verdict", "Acceptance length", "Tokens / NFE", "TTFT ms", "ITL ms", "Different texts")
    loads = list(dict.fromkeys(one.load for one in summaries))
    ranked = sorted(summaries, key=lambda one: (loads.index(one.load), -one.tokens_per_s.value))
    return table("All settings", ranked, {**own, **columns(*more)}, place_and_noise(ranked), "Fastest first.")


def _gamma_tables(summaries: Sequence[CellSummary]) -> list[Table]:
    """Tables of speed over gamma, and of drafts over gamma under the first load."""
    by_setting = [
        (
            place_of(one).title,
            setting.name + ("" if setting.first_token == "context" else f", first token by the {setting.first_token}"),
            setting.confidence_threshold,
            one,
        )
        for one in summaries
        if (setting := one.system.setting)
    ]
    speed = "Speed-up" if all(one.speed_up for one in summaries) else "Tokens/s"
    first = [one for one in by_setting if one[0] == by_setting[0][0]]
    return [
        over_gamma(name, COLUMNS[name], found)
        for name, found in ((speed, by_setting), ("Acceptance length", first), ("Tokens / NFE", first))
    ]
