"""Serving cells beside no speculation: their columns, their outcomes, and the picture that opens a section."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from twotower_bench.records import BASELINE, System
from twotower_bench.report.columns import COMPARED, Column, estimate, interval_names, milliseconds, number, share
from twotower_bench.report.document import Plot
from twotower_bench.report.findings import Outcome, at_once
from twotower_bench.report.plots import Point, draw_noise, line_panels, set_loads, set_names
from twotower_bench.report.wording import hues_of, kind_of
from twotower_bench.summary import CellSummary

PHASES = ("extend", "denoise", "host", "verify")


def phases_of(one: CellSummary) -> dict[str, float]:
    """Seconds of a round by phase; empty where TwoTower did not draft."""
    return {name: getattr(one.round_times, name) for name in PHASES} if one.round_times else {}


def _phase(name: str) -> Callable[[CellSummary], str]:
    return lambda one: milliseconds(phases_of(one)[name])


COLUMNS: Mapping[str, Column] = {
    **COMPARED,
    "TTFT ms": Column(
        lambda one: milliseconds(one.latency.first_token, one.latency.first_token_p99),
        "to the first token, median / 99th percentile",
    ),
    "ITL ms": Column(
        lambda one: milliseconds(one.latency.gap, one.latency.gap_p99), "between outputs, median / 99th percentile"
    ),
    "Acceptance length": Column(
        lambda one: estimate(one.acceptance.acceptance_length),
        "accepted drafts + 1 per step that verified drafts, with its 95 % interval over prompts; the last step of a "
        "text counts as far as the text goes",
    ),
    "Tokens / step": Column(lambda one: estimate(one.acceptance.tokens_per_step), "steps without drafts count, too"),
    "Tokens / NFE": Column(
        lambda one: number(one.tokens_per_nfe),
        "tokens of steps with drafts per denoiser pass, requests counted separately",
    ),
    "Drafts": Column(lambda one: number(one.acceptance.mean_draft_tokens, 1), "verified per step that had any"),
    "Steps with drafts": Column(lambda one: f"{one.acceptance.num_drafted_steps} of {one.acceptance.num_steps}"),
    "Extend ms": Column(_phase("extend"), "the context tower reads prompts and what was accepted"),
    "Denoise ms": Column(_phase("denoise"), "the denoiser's passes"),
    "Host ms": Column(_phase("host"), "the rest of drafting"),
    "Verify ms": Column(_phase("verify"), "the verifier and all the rest of vLLM"),
    "Drafting share": Column(lambda one: share(1 - phases_of(one)["verify"] / sum(phases_of(one).values()))),
}


def columns(*names: str) -> dict[str, Column]:
    """Columns of serving cells, by name."""
    return {name: COLUMNS[name] for name in names}


def outcomes_of(summaries: Sequence[CellSummary]) -> list[Outcome]:
    """Outcomes of all systems that were compared with no speculation."""
    kinds = {one.load: kind_of(one.load) for one in summaries}
    is_one_kind = len(set(kinds.values())) == 1
    return [
        Outcome(
            one.system,
            at_once(one.load.concurrency, "" if is_one_kind else kinds[one.load]),
            one.speed_up,
            one.comparison,
        )
        for one in summaries
        if one.speed_up is not None and one.system.name != BASELINE
    ]


def speed_up_plot(summaries: Sequence[CellSummary], systems: Iterable[System]) -> Plot:
    """Speed-up of some systems by concurrency, or by category where there is one concurrency alone."""
    names = {one.name for one in systems}
    known = [one for one in summaries if one.system.name in names and one.speed_up is not None]
    caption, kinds = speed_up_caption("Tokens/s", known), list(dict.fromkeys(kind_of(one.load) for one in known))
    concurrencies = list(dict.fromkeys(one.load.concurrency for one in known))
    if len(concurrencies) == 1:
        title = f"{concurrencies[0]} at once"
        panels = speed_up_panels(
            known, lambda _: title, lambda one: kinds.index(kind_of(one.load)), lambda _: "", names=kinds
        )
        return Plot("speed-up", "Speed-up by kind of prompts", caption, panels)
    panels = speed_up_panels(
        known, lambda one: kind_of(one.load), lambda one: one.load.concurrency, lambda _: "requests at once"
    )
    return Plot("speed-up", "Speed-up by load", caption, panels)


def speed_up_caption(what: str, known: Sequence[Any]) -> str:
    """What was compared and how to read it."""
    reading = "Only what lies outside the grey band, which is no speculation against itself, is beyond noise."
    if not any(one.comparison for one in known):
        reading = "With fewer than three repeats nothing here can be told from noise."
    return f"{what} over no speculation in the same repeat, the median of the repeats{interval_names(known)}. {reading}"


def speed_up_panels(
    known: Sequence[Any],
    kind: Callable[[Any], str],
    amount: Callable[[Any], float],
    label: Callable[[str], str],
    names: Sequence[str] = (),
) -> list[Axes]:
    """A panel for each kind of load, with the A/A band and a line for each system.

    Args:
        known: summaries with a speed-up.
        kind: title of a panel.
        amount: a load within its kind.
        label: of the x axis of a panel.
        names: written at 0, 1, ... of the x axis instead of loads; lines are then left out.
    """

    def decorate(axes: Axes) -> None:
        own = [one for one in known if kind(one) == axes.get_title(loc="left")]
        draw_noise(axes, {amount(one): one.comparison.noise_floor for one in own if one.comparison})
        axes.set_xlabel(label(kind(own[0])))
        set_names(axes, names) if names else set_loads(axes, map(amount, own))

    def point(one: Any) -> Point:
        ratio = one.comparison.speed_up if one.comparison else None
        ends = (ratio.low, ratio.high) if ratio else None
        return Point(kind(one), one.system.title, amount(one), ratio.value if ratio else one.speed_up, ends)

    kinds = list(dict.fromkeys(map(kind, known)))
    ranked = sorted(known, key=lambda one: (kinds.index(kind(one)), amount(one)))
    hues = hues_of(one.system for one in known)
    return line_panels(map(point, ranked), hues, "", "speed-up", hues if names else (), decorate)
