"""Plots by matplotlib: lines with intervals, the band of the A/A noise, and SVG for the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from twotower_bench.report.document import Plot
from twotower_bench.report.palette import DASHES, LIGHT, MARKERS, NUM_HUES
from twotower_bench.report.wording import hues_of, interval_names, place_of
from twotower_bench.summary import Summary
from twotower_spec.evaluation.statistics import Estimate

# Inches. The SVG's own units are points: on a phone, 358 px wide, a panel is drawn 1.08 times as large.
WIDTH, HEIGHT = 4.6, 3.4
# Of a legend's line, in characters; a marker takes as much room as some.
LEGEND_CHARACTERS, MARKER_CHARACTERS = 60, 8
# That names of places have side by side; with more they are turned.
TICK_CHARACTERS = 36

STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "text.parse_math": False,  # categories and titles are the user's, dollar signs included
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    **dict.fromkeys(("text.color", "axes.titlecolor"), LIGHT["text"]),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), LIGHT["muted"]),
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), LIGHT["grid"]),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "errorbar.capsize": 2.5,
    "legend.fontsize": 10.2,
    "legend.handlelength": 2.4,
    "svg.fonttype": "none",
}


def speed_up_plot(summaries: Iterable[Summary], what: str = "Tokens/s") -> Plot:
    """The picture that opens a section: speed-up by load, or by kind of prompts where there is one load alone.

    Args:
        summaries: of systems that speculate; those without a speed-up are left out.
        what: is compared.
    """
    known = [(one, place_of(one)) for one in summaries if one.speed_up is not None]
    kinds = list(dict.fromkeys(place.kind for _, place in known))
    is_one_load = len({place.phrase for _, place in known}) == 1 < len(kinds)
    panels: dict[str, dict[str, list[Summary]]] = {}
    for one, place in sorted(known, key=lambda pair: (kinds.index(pair[1].kind), pair[1].amount)):
        panel, load = (place.phrase, place.kind) if is_one_load else (place.kind, f"{place.amount:g}")
        panels.setdefault(panel, {}).setdefault(load, []).append(one)
    hues = hues_of(one.system for one, _ in known)
    drawn = [_speed_up_panel(title, by_load, hues, is_joined=not is_one_load) for title, by_load in panels.items()]
    ends = [end for axes in drawn for end in axes.get_ylim()]
    for axes in drawn:
        axes.set_ylim(min(ends), max(ends))
    reading = "Only what lies outside the grey band, which is no speculation against itself, is beyond noise."
    if not any(one.comparison for one, _ in known):
        reading = "With fewer than three repeats nothing here can be told from noise."
    names = interval_names(one for one, _ in known)
    caption = f"{what} over no speculation in the same repeat, the median of the repeats{names}. {reading}"
    return Plot("Speed-up by load", caption, drawn)


def _speed_up_panel(title: str, by_load: dict[str, list[Summary]], hues: dict[str, int], *, is_joined: bool) -> Axes:
    """Speed-ups side by side by load, no speculation, which is 1, and the band of the A/A noise."""
    axes = new_axes(title, "requests/s that come" if title == "open loop" else "requests at once", "speed-up")
    dashes, band = (0, (2, 2)), "noise (A/A)"
    axes.axhline(1, color=LIGHT["muted"], linewidth=1.1, linestyle=dashes, zorder=1.5, label="no speculation")
    lines: dict[str, list[tuple[int, Estimate]]] = {}
    for x, summaries in enumerate(by_load.values()):
        floors = [one.comparison.noise_floor for one in summaries if one.comparison]
        if floors:
            style: dict[str, Any] = {"color": LIGHT["hue-0"], "alpha": 0.22, "linewidth": 0, "label": band}
            axes.fill_between([x - 0.5, x + 0.5], 1 / floors[0], floors[0], **style)
            band = "_"  # the legend names it once
        for one in summaries:
            ratio = one.speed_up or 0.0
            found = one.comparison.speed_up if one.comparison else Estimate(ratio, ratio, ratio)
            lines.setdefault(one.system.title, []).append((x, found))
    for name, points in lines.items():
        draw(axes, name, hues[name], points, is_joined=is_joined)
    axes.set_xticks(range(len(by_load)), list(by_load))
    if sum(map(len, by_load)) > TICK_CHARACTERS:
        axes.tick_params("x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(by_load) - 0.5)
    if not is_joined:
        axes.set_xlabel("")
    return axes


def new_axes(title: str, x: str, y: str) -> Axes:
    """A panel in a figure of its own, with labels on its axes."""
    axes: Axes = Figure(figsize=(WIDTH, HEIGHT), layout="constrained").subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    return axes


def draw(axes: Axes, name: str, hue: int, points: Sequence[tuple[float, Estimate]], *, is_joined: bool) -> None:
    """Draws markers with their intervals, if any has one, and the line that joins them if it is to be."""
    hue %= NUM_HUES
    xs, ys = zip(*points, strict=True)
    # An estimate may lie a rounding error outside its interval.
    errors = [[max(one.value - one.low, 0.0) for one in ys], [max(one.high - one.value, 0.0) for one in ys]]
    style: dict[str, Any] = {"color": LIGHT[f"hue-{hue}"], "marker": MARKERS[hue], "label": name, "elinewidth": 1.3}
    style["linestyle"] = DASHES[hue] if is_joined else "none"
    axes.errorbar(xs, [one.value for one in ys], errors if any(one.has_width for one in ys) else None, **style)


def svg_of(axes: Axes, name: str, label: str) -> str:
    """An SVG element for HTML, with its legend below; its colours are the page's variables.

    Args:
        axes: of a panel.
        name: unique in the page; ids of clip paths and markers are made from it.
        label: for those who cannot see it.
    """
    figure, text = cast(Figure, axes.figure), io.StringIO()
    handles, labels = axes.get_legend_handles_labels()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        if handles and not figure.legends:
            columns = LEGEND_CHARACTERS // (max(map(len, labels)) + MARKER_CHARACTERS)
            figure.legend(handles, labels, loc="outside lower left", ncols=min(max(columns, 1), len(labels)))
        figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue().partition("<svg")[2]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:\w+)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    # Names of groups, which every figure gives alike; ids that are referred to belong to other elements.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg)
    for variable, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return f'<svg role="img" aria-label="{escape(label)}"{svg}'
