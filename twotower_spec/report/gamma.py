"""What the confidence threshold gamma does to speed and to drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twotower_spec.evaluation.serving_figures import Figures
from twotower_spec.evaluation.serving_profile import DraftSetting
from twotower_spec.report.document import Axis, Line, Mark, Panel, Plot, Reference
from twotower_spec.report.wording import place_of

MOST_LINES = 6
MOST_PANELS = 6


def gamma_plots(figures: Sequence[Figures]) -> list[Plot]:
    """Speed-up, acceptance length and tokens per denoiser pass over gamma; none where gamma does not vary.

    Args:
        figures: of a sweep.
    """
    families = _families(figures)
    if not families:
        return []
    loads = list(dict.fromkeys(one.load for one in figures))
    gammas = Axis("confidence threshold gamma")
    more = f" The {MOST_LINES} fastest ways to draft." if len(families) == MOST_LINES else ""
    speed_panels = [
        Panel(place_of(load), gammas, Axis("speed-up"), (Reference("no speculation", 1.0), *lines))
        for load in loads[:MOST_PANELS]
        if (lines := _lines([one for one in figures if one.load == load], families, _speed_up))
    ]
    at_least = [one for one in figures if one.load == loads[0]]
    drafts_panels = [
        Panel(title, gammas, Axis(label), tuple(_lines(at_least, families, value)))
        for title, label, value in (
            ("acceptance length", "tokens per step with drafts", _length),
            ("tokens per denoiser pass", "tokens per denoiser pass", _tokens_per_nfe),
        )
    ]
    where = place_of(loads[0])
    plots = [
        Plot(
            "gamma",
            "Speed-up over gamma",
            f"Medians of the repeats; settings that differ in gamma alone are joined.{more}",
            "A line that is level says that gamma does not matter there.",
            tuple(speed_panels),
        ),
        Plot(
            "gamma-drafts",
            "Drafts over gamma",
            f"{where[0].upper()}{where[1:]}; settings that differ in gamma alone are joined.{more}",
            "A higher gamma takes more denoiser passes; it pays where acceptance grows more than their time.",
            tuple(drafts_panels),
        ),
    ]
    return [plot for plot in plots if plot.panels and all(panel.marks for panel in plot.panels)]


def _family(setting: DraftSetting) -> str:
    """A setting without its gamma."""
    return setting.name + ("" if setting.first_token == "context" else f", first token by the {setting.first_token}")


def _families(figures: Sequence[Figures]) -> dict[str, int]:
    """Settings with more than one gamma, the fastest, with their hues."""
    gammas: dict[str, set[float]] = {}
    fastest: dict[str, float] = {}
    for one in figures:
        setting = one.system.setting
        if setting and setting.confidence_threshold is not None:
            name = _family(setting)
            gammas.setdefault(name, set()).add(setting.confidence_threshold)
            fastest[name] = max(fastest.get(name, 0.0), one.speed_up or one.tokens_per_s.median)
    several = sorted((name for name in gammas if len(gammas[name]) > 1), key=lambda name: -fastest[name])
    return {name: hue for hue, name in enumerate(several[:MOST_LINES], start=1)}


def _lines(
    figures: Sequence[Figures], families: dict[str, int], value: Callable[[Figures], float | None]
) -> list[Mark]:
    lines: list[Mark] = []
    for name, hue in families.items():
        points = sorted(
            (one.system.setting.confidence_threshold, found)
            for one in figures
            if one.system.setting
            and one.system.setting.confidence_threshold is not None
            and _family(one.system.setting) == name
            and (found := value(one)) is not None
        )
        if points:
            lines.append(Line(name, hue, tuple(x for x, _ in points), tuple(y for _, y in points)))
    return lines


def _speed_up(one: Figures) -> float | None:
    return one.speed_up


def _length(one: Figures) -> float | None:
    found = one.acceptance.acceptance_length
    return found.estimate if found else None


def _tokens_per_nfe(one: Figures) -> float | None:
    return one.tokens_per_nfe
