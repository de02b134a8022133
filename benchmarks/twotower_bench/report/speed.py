"""Serving cells beside no speculation: their columns, and the picture that opens a section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes

from twotower_bench.report.columns import COMPARED, Column, estimate, interval_names, milliseconds, number, share
from twotower_bench.report.document import Plot
from twotower_bench.report.plots import Point, draw_noise, line_panels, set_loads, set_names
from twotower_bench.report.wording import amount_in_words, amount_of, hues_of, kind_of
from twotower_bench.summary import CellSummary, Summary

# Amounts of load by kind, where these are not requests at once.
AMOUNTS = {"open loop": "requests/s that come"}
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


def speed_up_plot(summaries: Sequence[Summary], what: str = "Tokens/s") -> Plot:
    """Speed-up by load, a panel for each kind of load; by kind of prompts where there is one load alone.

    Args:
        summaries: of systems that speculate; those without a speed-up are left out.
        what: is compared.
    """
    known = [one for one in summaries if one.speed_up is not None]
    reading = "Only what lies outside the grey band, which is no speculation against itself, is beyond noise."
    if not any(one.comparison for one in known):
        reading = "With fewer than three repeats nothing here can be told from noise."
    caption = (
        f"{what} over no speculation in the same repeat, the median of the repeats{interval_names(known)}. {reading}"
    )
    kinds, places = list(dict.fromkeys(map(kind_of, known))), {amount_in_words(one) for one in known}
    hues = hues_of(one.system for one in known)
    if len(places) == 1 and len(kinds) > 1:
        axes = _speed_up_panel(known, hues, places.pop(), lambda one: kinds.index(kind_of(one)), kinds)
        return Plot("speed-up", "Speed-up by kind of prompts", caption, [axes])
    panels = [_speed_up_panel([one for one in known if kind_of(one) == kind], hues, kind, amount_of) for kind in kinds]
    return Plot("speed-up", "Speed-up by load", caption, panels)


def _speed_up_panel(
    known: Sequence[Summary],
    hues: Mapping[str, int],
    title: str,
    place: Callable[[Summary], float],
    names: Sequence[str] = (),
) -> Axes:
    """Speed-ups with the A/A band, joined over loads, or side by side under names at 0, 1, ... of the x axis."""

    def point(one: Summary) -> Point:
        if one.comparison is None:
            return Point(title, one.system.title, place(one), one.speed_up or 0.0)
        ratio = one.comparison.speed_up
        return Point(title, one.system.title, place(one), ratio.value, (ratio.low, ratio.high))

    def decorate(axes: Axes) -> None:
        draw_noise(axes, {place(one): one.comparison.noise_floor for one in known if one.comparison})
        set_names(axes, names) if names else set_loads(axes, map(place, known))

    label = "" if names else AMOUNTS.get(title, "requests at once")
    (axes,) = line_panels(
        map(point, sorted(known, key=place)), hues, label, "speed-up", hues if names else (), decorate
    )
    return axes
