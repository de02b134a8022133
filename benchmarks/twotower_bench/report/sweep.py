"""Section of `bench sweep`: TwoTower's settings in vLLM, throughput against what one user sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower_bench.recommendation import (
    Goal,
    Point,
    Recommendation,
    best_by_concurrency,
    front_of,
    recommend,
    sweep_points,
)
from twotower_bench.records import BASELINE, BASELINE_AGAIN, Load, ServingCell, System
from twotower_bench.report.document import Axis, Line, Panel, Plot, Row, RowGroup, Section, Table
from twotower_bench.report.drafts import draft_parts, without_drafts_notes
from twotower_bench.report.findings import finding
from twotower_bench.report.gamma import gamma_plots
from twotower_bench.report.reading import Measurements
from twotower_bench.report.speed import outcomes_of, speed_up_plots
from twotower_bench.report.wording import (
    GREY,
    as_json,
    groups_by_load,
    interval,
    intervals_of,
    milliseconds,
    num_of,
    number,
    place_of,
    rate,
    short_title,
    speed_up,
    spread,
)
from twotower_bench.summary import CellSummary, summarise_cells

PARETO = "Pareto"
# Of the Pareto plot: rivals have 3, the front 6.
HUES_OF_LOADS = (1, 2, 4, 5, 7)
# Of plots with a line for every system.
MOST_LINES = 7


def is_sweep(cells: Sequence[ServingCell]) -> bool:
    """Whether cells are about settings of TwoTower more than about its rivals."""
    return len({cell.system.setting for cell in cells if cell.system.setting}) > 1


@dataclass(frozen=True)
class Sweep:
    """What all parts of the section are made from.

    Attributes:
        cells, figures: of all systems under all loads.
        points: of every category and temperature.
        front: those that no other of the same category and temperature beats in both numbers.
        best: by category, temperature and concurrency, most tokens/s first beyond noise.
    """

    cells: Sequence[ServingCell]
    figures: Sequence[CellSummary]
    points: Sequence[Point]
    front: Sequence[Point]
    best: Sequence[Recommendation]

    @classmethod
    def of(cls, cells: Sequence[ServingCell]) -> Sweep:
        """From the cells of one run."""
        points: list[Point] = []
        front: list[Point] = []
        best: list[Recommendation] = []
        for category, temperature in _kinds(cells):
            own = sweep_points(cells, temperature, category)
            points += own
            front += front_of(own)
            best += best_by_concurrency(cells, temperature, category)
        return cls(cells, summarise_cells(cells), points, front, best)

    @property
    def front_places(self) -> set[tuple[str, Load]]:
        """System and load of the front."""
        return {(point.system.name, point.load) for point in self.front}

    @property
    def fastest(self) -> list[CellSummary]:
        """TwoTower's best under each load."""
        own = sorted((one for one in self.figures if one.system.is_two_tower), key=lambda one: one.tokens_per_s.value)
        return list({one.load: one for one in own}.values())

    @property
    def chosen(self) -> list[System]:
        """What plots show: rivals, the best and TwoTower's fastest at each load, the front; a few at most."""
        ranked = [
            *(one.point.system for one in self.best),
            *(one.system for one in self.fastest),
            *(point.system for point in reversed(self.front)),
        ]
        rivals = [one.system for one in self.figures if not one.system.is_two_tower]
        names = {system.name: system for system in (*rivals, *ranked) if not system.name.startswith(BASELINE)}
        return list(names.values())[:MOST_LINES]


def sweep_section(measured: Measurements, name: str) -> Section:
    """Of its serving cells.

    Args:
        measured: with at least one.
        name: of the section.
    """
    cells = measured.serving_cells
    sweep = Sweep.of(cells)
    figures = sweep.figures
    shown = {system.name for system in sweep.chosen}
    in_bars = [one for one in figures if one in sweep.fastest]
    tables, plots = draft_parts(cells, figures, shown, in_bars)
    num_settings = len({one.system.name for one in figures if one.system.is_two_tower})
    return Section(
        name,
        "Sweep over TwoTower's settings in vLLM",
        finding(outcomes_of(figures)),
        tuple(measured.origins),
        (*([_best_table(sweep)] if sweep.best else []), _front_table(sweep), _settings_table(sweep), *tables),
        (_pareto_plot(sweep), *speed_up_plots(figures, sweep.chosen), *gamma_plots(figures), *plots),
        (
            f"{num_settings} settings. The best of many is chosen from the same runs that its figures are of, so these "
            f"are a little too good; measure a choice anew.",
            *_recommendations(sweep),
            *without_drafts_notes(cells, figures),
        ),
        [as_json(one) for one in figures],
    )


def _kinds(cells: Sequence[ServingCell]) -> list[tuple[str, float]]:
    return list(dict.fromkeys((cell.load.category, cell.load.temperature) for cell in cells))


def _recommendations(sweep: Sweep) -> list[str]:
    """Sentences for both goals, where no speculation was measured to compare with."""
    measured = {
        (point.load.category, point.load.temperature) for point in sweep.points if point.system.name == BASELINE
    }
    return [
        recommend(sweep.cells, Goal(goal), temperature, category).sentence
        for category, temperature in _kinds(sweep.cells)
        if (category, temperature) in measured
        for goal in ("throughput", "latency")
    ]


def _best_table(sweep: Sweep) -> Table:
    by_place = {(one.system.name, one.load): one for one in sweep.figures}
    rows = []
    for one in sweep.best:
        found = by_place[one.point.system.name, one.point.load]
        runners_up = [short_title(point.system) for point in one.runners_up[:3]]
        more = len(one.runners_up) - len(runners_up)
        rows.append(
            Row(
                (
                    place_of(one.point.load),
                    short_title(one.point.system),
                    spread(one.point.tokens_per_s),
                    rate(one.point.user_tokens_per_s.value),
                    "" if found.system.name == BASELINE else speed_up(found.speed_up, found.comparison),
                    ("; ".join(runners_up) or "none") + (f"; {more} more" if more else ""),
                )
            )
        )
    columns = ("Load", "Best", "Tokens/s", "Tokens/s of one user", "Speed-up", "Cannot be told apart from it")
    note = (
        f"Most tokens/s of all users together, median of the repeats (quartiles); no speculation where nothing is "
        f"faster than it beyond the noise. Speed-up: over no speculation in the same repeat, the median"
        f"{intervals_of(sweep.figures)}. Cannot be told apart: settings that are behind the best by no more than the "
        f"A/A noise."
    )
    return Table("Best at each concurrency", columns, (RowGroup("", tuple(rows)),), note)


def _front_table(sweep: Sweep) -> Table:
    rows = tuple(
        Row(
            (
                short_title(point.system),
                place_of(point.load),
                spread(point.tokens_per_s),
                spread(point.user_tokens_per_s),
            )
        )
        for point in reversed(sweep.front)
    )
    columns = ("System", "Load", "Tokens/s of all", "Tokens/s of one user")
    note = "What no other setting at any concurrency beats in both numbers. Median of the repeats (quartiles)."
    return Table("Pareto front", columns, (RowGroup("", rows),), note)


def _settings_table(sweep: Sweep) -> Table:
    """All, fastest first under each load, those of the front marked."""
    loads = list(dict.fromkeys(one.load for one in sweep.figures))
    points = {(one.system.name, one.load): one for one in sweep.points}
    ranked = sorted(sweep.figures, key=lambda one: (loads.index(one.load), -one.tokens_per_s.value))
    rows = [
        Row(
            (
                short_title(one.system),
                spread(one.tokens_per_s),
                rate(point.user_tokens_per_s.value) if (point := points.get((one.system.name, one.load))) else "",
                "" if one.system.name == BASELINE else speed_up(one.speed_up, one.comparison),
                "" if one.verdict == "-" else one.verdict,
                interval(one.acceptance.acceptance_length),
                number(one.tokens_per_nfe),
                milliseconds(one.latency.first_token, one.latency.first_token_p99),
                milliseconds(one.latency.gap, one.latency.gap_p99),
                "" if one.system.name == BASELINE else num_of(one.num_different, one.num_requests),
            ),
            PARETO if (one.system.name, one.load) in sweep.front_places else "",
        )
        for one in ranked
    ]
    columns = (
        "System", "Tokens/s", "Of one user", "Speed-up", "Verdict", "Acceptance length", "Tokens / NFE", "TTFT ms",
        "ITL ms", "Different texts",
    )  # fmt: skip
    note = (
        f"Fastest first. Tokens/s: median of the repeats (quartiles). Of one user: median of the repeats, after the "
        f"first token. Speed-up: over no speculation in the same repeat, the median{intervals_of(ranked)}. TTFT, ITL: "
        f"median / 99th percentile. Different texts: prompts whose text is not that of no speculation."
    )
    return Table("All settings", columns, groups_by_load(ranked, rows, with_noise=True), note)


def _pareto_plot(sweep: Sweep) -> Plot:
    panels = tuple(_pareto_panel(sweep, *kind) for kind in _kinds(sweep.cells))
    return Plot(
        "pareto",
        "Throughput against the speed of one user",
        "Every setting at every concurrency: tokens/s of all users together, and of one user after its first token.",
        "Up and to the right is better; the line joins what nothing beats in both.",
        panels,
    )


def _pareto_panel(sweep: Sweep, category: str, temperature: float) -> Panel:
    def of(points: Sequence[Point]) -> list[Point]:
        return [one for one in points if (one.load.category, one.load.temperature) == (category, temperature)]

    def line(label: str, hue: int, points: Sequence[Point], is_connected: bool = False) -> Line:
        xs = tuple(one.user_tokens_per_s.value for one in points)
        return Line(label, hue, xs, tuple(one.tokens_per_s.value for one in points), is_connected=is_connected)

    points = of(sweep.points)
    marks = [line("Pareto front", 6, of(sweep.front), is_connected=True)]
    for hue, few in zip(HUES_OF_LOADS, _at_most(len(HUES_OF_LOADS), points), strict=False):
        own = [one for one in points if one.system.is_two_tower and one.load.concurrency in few]
        marks.append(line(f"TwoTower, {' to '.join(map(str, dict.fromkeys((few[0], few[-1]))))} at once", hue, own))
    rivals = [
        one for one in points if not one.system.is_two_tower and one.system.name not in (BASELINE, BASELINE_AGAIN)
    ]
    if rivals:
        marks.append(line("rivals", 3, rivals))
    marks.append(line("no speculation", GREY, [one for one in points if one.system.name == BASELINE], True))
    title = f"{category}, temperature {temperature:g}" if len(_kinds(sweep.cells)) > 1 else ""
    return Panel(title, Axis("tokens/s of one user"), Axis("tokens/s of all"), tuple(marks))


def _at_most(number: int, points: Sequence[Point]) -> list[list[int]]:
    """Their concurrencies, each for itself; where there are more than `number`, the highest together."""
    ranked = sorted({one.load.concurrency for one in points})
    apart = [[one] for one in ranked]
    return apart if len(apart) <= number else [*apart[: number - 1], ranked[number - 1 :]]
