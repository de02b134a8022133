"""What the confidence threshold gamma does: settings that differ in it alone are lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes

from twotower_bench.records import DraftSetting
from twotower_bench.report.document import Plot
from twotower_bench.report.plots import Point, draw_level, line_panels
from twotower_bench.report.wording import place_of
from twotower_bench.summary import CellSummary

MOST_LINES = 6
MOST_PANELS = 6


def gamma_panels(points: Sequence[Point], families: Mapping[str, int], label: str, level: str = "") -> list[Axes]:
    """Lines of some families over gamma.

    Args:
        points: values by gamma, lines called as their families.
        families: see `fastest_families`.
        label: of the y axis.
        level: what has the value 1; "" for nothing to compare with.
    """

    def decorate(axes: Axes) -> None:
        if level:
            draw_level(axes, level)

    chosen = sorted((one for one in points if one.line in families), key=lambda one: one.x)
    return line_panels(chosen, families, "confidence threshold gamma", label, (), decorate)


def fastest_families(speeds: Sequence[Point]) -> dict[str, int]:
    """Hues of the ways to draft with more than one gamma, the fastest first, at most `MOST_LINES`."""
    gammas = {name: {one.x for one in speeds if one.line == name} for name in dict.fromkeys(one.line for one in speeds)}
    several = [name for name, own in gammas.items() if len(own) > 1]
    ranked = sorted(several, key=lambda name: -max(one.y for one in speeds if one.line == name))
    return {name: hue for hue, name in enumerate(ranked[:MOST_LINES], start=1)}


def joined_in_words(families: Mapping[str, int]) -> str:
    """What lines join, for a caption."""
    more = f" The {MOST_LINES} fastest ways to draft." if len(families) == MOST_LINES else ""
    return f"Settings that differ in gamma alone are joined.{more}"


def gamma_plots(summaries: Sequence[CellSummary]) -> list[Plot]:
    """Speed, acceptance length and tokens per denoiser pass over gamma; none where gamma does not vary.

    Args:
        summaries: of a sweep.
    """

    def points(panel: Callable[[CellSummary], str], value: Callable[[CellSummary], float | None]) -> list[Point]:
        return [
            Point(panel(one), _family(setting), gamma, y)
            for one in summaries
            if (setting := one.system.setting) and (gamma := setting.confidence_threshold) is not None
            if (y := value(one)) is not None
        ]

    is_compared = all(one.speed_up for one in summaries)
    speeds = points(place_of, lambda one: one.speed_up if is_compared else one.tokens_per_s.value)
    families = fastest_families(speeds)
    if not families:
        return []
    first = place_of(summaries[0])
    summaries = [one for one in summaries if place_of(one) == first]
    lengths = points(lambda _: "acceptance length", _acceptance_length)
    passes = points(lambda _: "tokens per denoiser pass", lambda one: one.tokens_per_nfe)
    joined = joined_in_words(families)
    label, level = ("speed-up", "no speculation") if is_compared else ("tokens/s", "")
    return [
        Plot(
            "gamma",
            "Speed over gamma",
            f"Medians of the repeats. {joined} A line that is level says that gamma does not matter there.",
            gamma_panels(speeds, families, label, level)[:MOST_PANELS],
        ),
        Plot(
            "gamma-drafts",
            "Drafts over gamma",
            f"At {first}. {joined} A higher gamma takes more denoiser passes; it pays where acceptance grows more than "
            f"their time.",
            [axes for values in (lengths, passes) for axes in gamma_panels(values, families, "tokens")],
        ),
    ]


def _acceptance_length(one: CellSummary) -> float | None:
    return one.acceptance.acceptance_length.value if one.acceptance.acceptance_length else None


def _family(setting: DraftSetting) -> str:
    """A setting without its gamma."""
    return setting.name + ("" if setting.first_token == "context" else f", first token by the {setting.first_token}")
