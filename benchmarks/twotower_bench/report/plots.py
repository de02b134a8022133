"""Plots by matplotlib: lines with intervals, the band of the A/A noise, stacked bars, and SVG for the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from twotower_bench.report.palette import DASHES, LIGHT, MARKERS, NUM_HUES
from twotower_bench.report.wording import hues_of, place_of
from twotower_bench.summary import Summary
from twotower_spec.evaluation.statistics import Estimate

# The line that joins what nothing beats.
FRONT = "Pareto front"
# Inches. The SVG's own units are points: on a phone, 358 px wide, a panel is drawn 1.08 times as large.
WIDTH, HEIGHT = 4.6, 3.4
BAR_HEIGHT, BARS_MARGIN = 0.26, 1.1
# Of a legend's line, in characters; a marker takes as much room as some.
LEGEND_CHARACTERS, MARKER_CHARACTERS = 60, 8

STYLE: dict[Any, Any] = {
    "font.size": 10.5,
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


class Point(NamedTuple):
    """A point of a line.

    Attributes:
        panel, line: titles of its panel and of its line.
        x, y: where.
        ends: of an interval around `y`; None for none.
    """

    panel: str
    line: str
    x: float
    y: float
    ends: tuple[float, float] | None = None


def line_panels(
    points: Iterable[Point],
    hues: Mapping[str, int],
    x: str,
    y: str,
    unjoined: Collection[str] = (),
    decorate: Callable[[str, Axes], None] = lambda *_: None,
) -> list[Axes]:
    """Panels with their lines, all with the same range of heights.

    Args:
        points: those of a line in order.
        hues: by line; the others get what follows.
        x, y: labels of the axes.
        unjoined: lines whose points stand alone.
        decorate: draws more on the axes of the panel of a title.
    """
    lines: dict[tuple[str, str], list[Point]] = {}
    for one in points:
        lines.setdefault((one.panel, one.line), []).append(one)
    numbers = {**{name: place for place, name in enumerate(dict.fromkeys(name for _, name in lines), start=1)}, **hues}
    panels = {title: _new_axes(title, x, y) for title, _ in lines}
    for (title, name), own in lines.items():
        _draw_line(panels[title], own, numbers[name] % NUM_HUES, is_joined=name not in unjoined)
    for title, axes in panels.items():
        decorate(title, axes)
    ends = [end for axes in panels.values() for end in axes.get_ylim()]
    for axes in panels.values():
        axes.set_ylim(min(ends), max(ends))
    return list(panels.values())


def load_panels(
    summaries: Sequence[Summary], y: str, value: Callable[[Any], Estimate | float | None], *, is_ratio: bool = False
) -> list[Axes]:
    """Panels over load, one for each kind of load; one over kinds of prompts where there is one load alone.

    Args:
        summaries: those without a value are left out.
        y: label of the values.
        value: with an interval, if it has one.
        is_ratio: draws no speculation, which is 1, and the band of the A/A noise.
    """
    known = [(one, place_of(one), found) for one in summaries if (found := value(one)) is not None]
    kinds = list(dict.fromkeys(place.kind for _, place, _ in known))
    is_one_load = len({place.phrase for _, place, _ in known}) == 1 < len(kinds)
    points, places, floors = [], set[tuple[str, float]](), dict[tuple[str, float], float]()
    for one, place, found in sorted(known, key=lambda each: (kinds.index(each[1].kind), each[1].amount)):
        panel, x = (place.phrase, kinds.index(place.kind)) if is_one_load else (place.kind, place.amount)
        middle, ends = (found.value, (found.low, found.high)) if isinstance(found, Estimate) else (found, None)
        points.append(Point(panel, one.system.title, x, middle, ends))
        places.add((panel, x))
        if one.comparison:
            floors[panel, x] = one.comparison.noise_floor

    def decorate(panel: str, axes: Axes) -> None:
        if is_ratio:
            _draw_noise(axes, {x: floor for (title, x), floor in floors.items() if title == panel})
        if is_one_load:
            _set_places(axes.xaxis, kinds)
            axes.set(xlabel="", xlim=(-0.5, len(kinds) - 0.5))
            return
        own = sorted(x for title, x in places if title == panel)
        if len(own) > 1:
            axes.set_xscale("log", base=2)  # every doubling is as wide
        _set_places(axes.xaxis, [f"{one:g}" for one in own], own)
        axes.set_xlabel("requests/s that come" if panel == "open loop" else "requests at once")

    hues = hues_of(one.system for one, _, _ in known)
    return line_panels(points, hues, "", y, hues if is_one_load else (), decorate)


def stacked_bars(names: Sequence[str], layers: Mapping[str, Sequence[float]], hues: Iterable[int], x: str) -> Axes:
    """Horizontal bars, the first on top, of layers that add up.

    Args:
        names: of the bars.
        layers: values by name of the layer, one for every bar.
        hues: of the layers.
        x: label of the lengths.
    """
    axes = _new_axes("", x, "", BARS_MARGIN + BAR_HEIGHT * len(names))
    left = [0.0] * len(names)
    for (label, values), hue in zip(layers.items(), hues, strict=True):
        axes.barh(range(len(names)), values, 0.66, left, color=LIGHT[f"hue-{hue}"], label=label)
        left = [start + value for start, value in zip(left, values, strict=True)]
    _set_places(axes.yaxis, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    return axes


def _new_axes(title: str, x: str, y: str, height: float = HEIGHT) -> Axes:
    axes: Axes = Figure(figsize=(WIDTH, height), layout="constrained").subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    return axes


def _draw_line(axes: Axes, points: Sequence[Point], hue: int, *, is_joined: bool) -> None:
    """A line with its markers, and intervals where all points have one."""
    xs, ys = [one.x for one in points], [one.y for one in points]
    # An estimate may lie a rounding error outside its interval.
    errors = [[max(one.y - one.ends[0], 0.0), max(one.ends[1] - one.y, 0.0)] for one in points if one.ends]
    style: dict[str, Any] = {"color": LIGHT[f"hue-{hue}"], "marker": MARKERS[hue], "label": points[0].line}
    style |= {"linestyle": DASHES[hue] if is_joined else "none", "elinewidth": 1.3}
    axes.errorbar(xs, ys, [*zip(*errors, strict=True)] if len(errors) == len(points) else None, **style)


def _draw_noise(axes: Axes, floors: Mapping[float, float]) -> None:
    """Speed 1, and the band of noise floors by x in which nothing can be told from no speculation against itself."""
    dashes = (0, (2, 2))
    axes.axhline(1, color=LIGHT["muted"], linewidth=1.1, linestyle=dashes, zorder=1.5, label="no speculation")
    style: dict[str, Any] = {"color": LIGHT["hue-0"], "alpha": 0.22, "linewidth": 0, "label": "noise (A/A)"}
    xs, high = sorted(floors), [floors[x] for x in sorted(floors)]
    if len(xs) == 1:
        axes.axhspan(1 / high[0], high[0], **style)
    elif xs:
        axes.fill_between(xs, [1 / floor for floor in high], high, **style)


def _set_places(axis: Axis, names: Sequence[str], places: Sequence[float] | None = None) -> None:
    """Writes names at places of an axis, or at 0, 1, ..."""
    axis.set_major_locator(FixedLocator(range(len(names)) if places is None else places))
    axis.set_major_formatter(FixedFormatter(names))
    axis.set_minor_locator(NullLocator())


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
