"""Section of `bench sweep`: TwoTower's settings in vLLM, throughput against what one user sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from twotower_bench import recommendation
from twotower_bench.recommendation import Goal, Recommendation, best_by_concurrency, front_of, recommend, sweep_points
from twotower_bench.records import BASELINE, ServingCell, System
from twotower_bench.report.columns import COMPARED, Column, estimate, place_and_noise, rate, table
from twotower_bench.report.document import Plot, Section, Table
from twotower_bench.report.drafts import draft_parts, without_drafts_notes
from twotower_bench.report.findings import finding, places_of, remarks
from twotower_bench.report.gamma import gamma_plots
from twotower_bench.report.plots import Point, line_panels
from twotower_bench.report.reading import Measurements
from twotower_bench.report.speed import columns, speed_up_plot
from twotower_bench.report.wording import load_in_words, short_title
from twotower_bench.summary import CellSummary, summarise_cells

FRONT = "Pareto front"
# Of the Pareto plot, besides the front, rivals and no speculation: concurrencies, one by one as far as they go.
HUES = {FRONT: 6, "rivals": 3, "no speculation": 0}
HUES_OF_LOADS = (1, 2, 4, 5, 7)
# Of plots with a line for every system.
MOST_LINES = 7
# Named in the table of the best.
MOST_RUNNERS_UP = 3


def is_sweep(cells: Sequence[ServingCell]) -> bool:
    """Whether cells are about settings of TwoTower more than about its rivals."""
    return len({cell.system.setting for cell in cells if cell.system.setting}) > 1


@dataclass(frozen=True)
class Sweep:
    """Figures and choices that the section shows.

    Attributes:
        summaries: of all systems under all loads.
        points: of every category and temperature.
        front: those that no other of the same category and temperature beats in both numbers.
        best: by category, temperature and concurrency, most tokens/s first beyond noise.
        recommendations: for both goals, where no speculation was measured to compare with.
    """

    summaries: Sequence[CellSummary]
    points: Sequence[recommendation.Point]
    front: Sequence[recommendation.Point]
    best: Sequence[Recommendation]
    recommendations: Sequence[Recommendation]

    @classmethod
    def of(cls, cells: Sequence[ServingCell]) -> Sweep:
        """Makes all of it from the cells of one run."""
        points, front, best, recommendations = [], [], [], []
        for category, temperature in dict.fromkeys((cell.load.category, cell.load.temperature) for cell in cells):
            own = sweep_points(cells, temperature, category)
            points += own
            front += front_of(own)
            best += best_by_concurrency(cells, temperature, category)
            if any(point.system.name == BASELINE for point in own):
                goals = (Goal("throughput"), Goal("latency"))
                recommendations += [recommend(cells, goal, temperature, category) for goal in goals]
        return cls(summarise_cells(cells), points, front, best, recommendations)

    @property
    def fastest(self) -> list[CellSummary]:
        """TwoTower's best under each load."""
        own = sorted((one for one in self.summaries if one.system.is_two_tower), key=lambda one: one.tokens_per_s.value)
        return list({one.load: one for one in own}.values())

    @property
    def chosen(self) -> list[System]:
        """What plots show: rivals, the best and TwoTower's fastest at each load, the front; a few at most."""
        ranked = [
            *(one.system for one in self.summaries if not one.system.is_two_tower),
            *(one.point.system for one in self.best),
            *(one.system for one in self.fastest),
            *(point.system for point in reversed(self.front)),
        ]
        names = {system.name: system for system in ranked if not system.name.startswith(BASELINE)}
        return list(names.values())[:MOST_LINES]


def sweep_section(measured: Measurements, name: str) -> Section:
    """A section of serving cells.

    Args:
        measured: with at least one.
        name: of the section.
    """
    cells = measured.serving_cells
    sweep = Sweep.of(cells)
    summaries, places = sweep.summaries, places_of(sweep.summaries)
    shown = {system.name for system in sweep.chosen}
    tables, plots = draft_parts(cells, summaries, shown, sweep.fastest)
    num_settings = len({one.system.name for one in summaries if one.system.is_two_tower})
    return Section(
        name,
        "Sweep over TwoTower's settings in vLLM",
        finding(places),
        [
            *remarks(places),
            *(one.sentence for one in sweep.recommendations),
            f"{num_settings} settings. The best of many is chosen from the same runs that its figures are of, so these "
            f"are a little too good; measure a choice anew.",
            *without_drafts_notes(cells, summaries),
        ],
        [
            table("Best at each concurrency", sweep.best, _best_columns(sweep)),
            table(FRONT, sweep.front[::-1], POINT, note="What no other setting beats in both numbers."),
            _settings_table(sweep),
            *tables,
        ],
        [
            speed_up_plot([one for one in summaries if one.system.name in shown]),
            _pareto_plot(sweep),
            *gamma_plots(summaries),
            *plots,
        ],
        summaries,
        measured.origins,
    )


POINT: Mapping[str, Column] = {
    "System": COMPARED["System"],
    "Load": Column(lambda one: load_in_words(one.load)),
    "Tokens/s of all": Column(lambda one: estimate(one.tokens_per_s, rate), "median of the repeats (quartiles)"),
    "Tokens/s of one user": Column(
        lambda one: estimate(one.user_tokens_per_s, rate), "likewise, after the first token"
    ),
}


def _best_columns(sweep: Sweep) -> dict[str, Column]:
    by_place = {(one.system.name, one.load): one for one in sweep.summaries}

    def speed_up(best: Recommendation) -> str:
        return COMPARED["Speed-up"].text(by_place[best.point.system.name, best.point.load])

    def near(best: Recommendation) -> str:
        titles = [short_title(point.system) for point in best.runners_up]
        more = [f"{len(titles) - MOST_RUNNERS_UP} more"] if len(titles) > MOST_RUNNERS_UP else []
        return "; ".join([*titles[:MOST_RUNNERS_UP], *more]) or "none"

    return {
        "Load": Column(lambda best: load_in_words(best.point.load)),
        "Best": Column(
            lambda best: short_title(best.point.system),
            "most tokens/s of all users together; no speculation where nothing is faster than it beyond the noise",
        ),
        "Tokens/s": Column(lambda best: estimate(best.point.tokens_per_s, rate), "median of the repeats (quartiles)"),
        "Tokens/s of one user": Column(lambda best: rate(best.point.user_tokens_per_s.value)),
        "Speed-up": Column(speed_up, COMPARED["Speed-up"].meaning),
        "Cannot be told apart from it": Column(near, "behind the best by no more than the A/A noise"),
    }


def _settings_table(sweep: Sweep) -> Table:
    """All settings, fastest first under each load, those of the front marked."""
    front = {(point.system.name, point.load) for point in sweep.front}
    users = {(one.system.name, one.load): rate(one.user_tokens_per_s.value) for one in sweep.points}
    own = {
        "System": COMPARED["System"],
        "Pareto": Column(lambda one: "front" if (one.system.name, one.load) in front else ""),
        "Tokens/s": COMPARED["Tokens/s"],
        "Of one user": Column(lambda one: users.get((one.system.name, one.load), ""), "after the first token"),
    }
    more = ("Speed-up", "Verdict", "Acceptance length", "Tokens / NFE", "TTFT ms", "ITL ms", "Different texts")
    loads = list(dict.fromkeys(one.load for one in sweep.summaries))
    ranked = sorted(sweep.summaries, key=lambda one: (loads.index(one.load), -one.tokens_per_s.value))
    return table("All settings", ranked, {**own, **columns(*more)}, place_and_noise(ranked), "Fastest first.")


def _pareto_plot(sweep: Sweep) -> Plot:
    caption = (
        "Every setting at every concurrency: tokens/s of all users together, and of one user after its first token. "
        "Up and to the right is better; the line joins what nothing beats in both."
    )
    panels = [_pareto_panel(sweep, kind) for kind in dict.fromkeys(_kind(one) for one in sweep.points)]
    return Plot("pareto", "Throughput against the speed of one user", caption, panels)


def _kind(one: recommendation.Point) -> str:
    return load_in_words(one.load).rpartition(", ")[0]


def _pareto_panel(sweep: Sweep, kind: str) -> Axes:
    own = [one for one in sweep.points if _kind(one) == kind]
    concurrencies = sorted({one.load.concurrency for one in own})
    # The last hue stands for all higher concurrencies together.
    last = concurrencies[len(HUES_OF_LOADS) - 1 :]
    names = {number: f"TwoTower, {number} at once" for number in concurrencies}
    if len(last) > 1:
        names |= dict.fromkeys(last, f"TwoTower, {last[0]} to {last[-1]} at once")

    def line(one: recommendation.Point) -> str:
        if one.system.is_two_tower:
            return names[one.load.concurrency]
        return "no speculation" if one.system.name == BASELINE else "rivals"

    ranked = sorted(own, key=lambda one: one.load.concurrency)
    front = [(FRONT, one) for one in sweep.front if _kind(one) == kind]
    points = [
        Point(kind, label, one.user_tokens_per_s.value, one.tokens_per_s.value)
        for label, one in (*front, *((line(one), one) for one in ranked))
    ]
    lines = dict(zip(dict.fromkeys(names.values()), HUES_OF_LOADS, strict=False))
    unjoined = [*lines, "rivals"]
    (axes,) = line_panels(points, {**HUES, **lines}, "tokens/s of one user", "tokens/s of all", unjoined)
    return axes
