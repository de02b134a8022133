"""What the confidence threshold gamma does: settings that differ in it alone are lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twotower_bench.records import DraftSetting, Load
from twotower_bench.report.document import Axis, Line, Panel, Plot, Reference
from twotower_bench.report.wording import place_of
from twotower_bench.summary import CellSummary

MOST_LINES = 6
MOST_PANELS = 6
GAMMAS = Axis("confidence threshold gamma")


@dataclass(frozen=True)
class GammaPoint:
    """A measured setting.

    Attributes:
        family: what settings that differ in gamma alone have in common, in words.
        gamma: its own.
        speed: beside others.
        values: more of it, by name; those that are known.
    """

    family: str
    gamma: float
    speed: float
    values: Mapping[str, float]


def families_of(points: Sequence[GammaPoint]) -> dict[str, int]:
    """Families with more than one gamma, the fastest, at most `MOST_LINES`, with their hues."""
    gammas: dict[str, set[float]] = {}
    for point in points:
        gammas.setdefault(point.family, set()).add(point.gamma)
    several = [name for name, own in gammas.items() if len(own) > 1]
    fastest = {name: max(point.speed for point in points if point.family == name) for name in several}
    ranked = sorted(several, key=lambda name: -fastest[name])[:MOST_LINES]
    return {name: hue for hue, name in enumerate(ranked, start=1)}


def gamma_lines(points: Sequence[GammaPoint], families: Mapping[str, int], value: str) -> list[Line]:
    """A value over gamma, a line for each family that has any."""
    lines = []
    for name, hue in families.items():
        known = sorted((one.gamma, one.values[value]) for one in points if one.family == name and value in one.values)
        if known:
            xs, ys = zip(*known, strict=True)
            lines.append(Line(name, hue, xs, ys))
    return lines


def joined_in_words(families: Mapping[str, int]) -> str:
    """What lines join, in a sentence or two of a caption."""
    more = f" The {MOST_LINES} fastest ways to draft." if len(families) == MOST_LINES else ""
    return f"Settings that differ in gamma alone are joined.{more}"


def gamma_plots(figures: Sequence[CellSummary]) -> list[Plot]:
    """Speed-up, acceptance length and tokens per denoiser pass over gamma; none where gamma does not vary.

    Args:
        figures: of a sweep.
    """
    by_load = {load: _points(figures, load) for load in dict.fromkeys(one.load for one in figures)}
    families = families_of([point for points in by_load.values() for point in points])
    if not families:
        return []
    speed_panels = [
        Panel(place_of(load), GAMMAS, Axis("speed-up"), (Reference("no speculation", 1.0), *lines))
        for load, points in list(by_load.items())[:MOST_PANELS]
        if (lines := gamma_lines(points, families, "speed-up"))
    ]
    first, points = next(iter(by_load.items()))
    drafts_panels = [
        Panel(title, GAMMAS, Axis(label), tuple(gamma_lines(points, families, label)))
        for title, label in (
            ("acceptance length", "tokens per step with drafts"),
            ("tokens per denoiser pass", "tokens per denoiser pass"),
        )
    ]
    where, joined = place_of(first), joined_in_words(families)
    plots = [
        Plot(
            "gamma",
            "Speed-up over gamma",
            f"Medians of the repeats. {joined}",
            "A line that is level says that gamma does not matter there.",
            tuple(speed_panels),
        ),
        Plot(
            "gamma-drafts",
            "Drafts over gamma",
            f"{where[0].upper()}{where[1:]}. {joined}",
            "A higher gamma takes more denoiser passes; it pays where acceptance grows more than their time.",
            tuple(drafts_panels),
        ),
    ]
    return [plot for plot in plots if plot.panels and all(panel.marks for panel in plot.panels)]


def _points(figures: Sequence[CellSummary], load: Load) -> list[GammaPoint]:
    """Of TwoTower's settings with a gamma under one load."""
    points = []
    for one in figures:
        setting, length = one.system.setting, one.acceptance.acceptance_length
        if one.load == load and setting and setting.confidence_threshold is not None:
            values = {
                "speed-up": one.speed_up,
                "tokens per step with drafts": length.value if length else None,
                "tokens per denoiser pass": one.tokens_per_nfe,
            }
            known = {name: value for name, value in values.items() if value is not None}
            speed = one.speed_up or one.tokens_per_s.value
            points.append(GammaPoint(_family(setting), setting.confidence_threshold, speed, known))
    return points


def _family(setting: DraftSetting) -> str:
    """A setting without its gamma."""
    return setting.name + ("" if setting.first_token == "context" else f", first token by the {setting.first_token}")
