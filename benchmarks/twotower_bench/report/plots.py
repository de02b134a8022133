"""Plots drawn by matplotlib: one SVG a panel, whose colours are CSS variables, and one PNG a plot."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from twotower_bench.report.document import Axis, Band, Bars, Line, Panel, Plot, Reference
from twotower_bench.report.palette import DASHES, LIGHT, MARKERS, NUM_HUES, PLACEHOLDERS

# Inches. The SVG's own units are points: on a phone, 358 px wide, a panel is drawn 1.08 times as large.
WIDTH, HEIGHT = 4.6, 3.1
BAR_HEIGHT, BARS_MARGIN = 0.26, 0.75
FONT_SIZE = 10.5
PNG_DPI = 2 * 72
COLUMNS_OF_PNG = 3
MARKER_AREA = 36.0
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"


def svg_of(plot: Plot, index: int, name: str) -> str:
    """One panel as an SVG element for HTML; it has no legend.

    Args:
        plot: whose panels have common scales where they have common axes.
        index: of the panel.
        name: unique in the page; of ids.
    """
    panel = plot.panels[index]
    settings = {**_settings(PLACEHOLDERS), "svg.fonttype": "none", "svg.hashsalt": f"{name}-{index}"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, _height(panel)), layout="constrained")
        _draw(figure.subplots(), panel, PLACEHOLDERS, _common_range(plot.panels))
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    label = ": ".join(part for part in (plot.title, panel.title) if part)
    return _for_html(text.getvalue(), f"{label}. {plot.caption}")


def png_of(plot: Plot) -> bytes:
    """All panels with their legend, light."""
    columns = min(len(plot.panels), COLUMNS_OF_PNG)
    rows = -(-len(plot.panels) // columns)
    height = max(map(_height, plot.panels))
    with matplotlib.rc_context(_settings(LIGHT)):
        figure = Figure(figsize=(WIDTH * columns, height * rows + 0.6), layout="constrained", facecolor=LIGHT["ground"])
        places = figure.subplots(rows, columns, squeeze=False).flat
        common = _common_range(plot.panels)
        for axes, panel in zip(places, plot.panels, strict=False):
            _draw(axes, panel, LIGHT, common)
        for axes in list(places)[len(plot.panels) :]:
            axes.set_axis_off()
        handles = {label: handle for axes in figure.axes for handle, label in zip(*_legend(axes), strict=True)}
        figure.suptitle(plot.title, x=0.01, ha="left", weight="bold")
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 2 * columns)
        )
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return content.getvalue()


def _settings(colours: Mapping[str, str]) -> dict[Any, Any]:
    text, muted = colours["text"], colours["muted"]
    return {
        "font.size": FONT_SIZE,
        "axes.titlesize": FONT_SIZE + 0.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": text,
        "axes.titlecolor": text,
        "axes.labelcolor": muted,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.color": colours["grid"],
        "ytick.color": colours["grid"],
        "axes.edgecolor": colours["grid"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colours["grid"],
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "lines.markersize": MARKER_AREA**0.5,
        "legend.frameon": False,
        "figure.constrained_layout.w_pad": 0.03,
        "figure.constrained_layout.h_pad": 0.04,
    }


def _height(panel: Panel) -> float:
    return BARS_MARGIN + BAR_HEIGHT * len(panel.y.names) if panel.y.names else HEIGHT


def _draw(axes: Axes, panel: Panel, colours: Mapping[str, str], common: tuple[float, float] | None) -> None:
    axes.set(title=panel.title, xlabel=panel.x.label, ylabel=panel.y.label)
    left: Sequence[float] = [0.0] * len(panel.y.names)
    for mark in panel.marks:
        if isinstance(mark, Line):
            _draw_line(axes, mark, colours)
        elif isinstance(mark, Bars):
            colour = colours[f"hue-{mark.hue % NUM_HUES}"]
            axes.barh(range(len(left)), mark.values, 0.66, left, color=colour, label=mark.label)
            left = [start + value for start, value in zip(left, mark.values, strict=True)]
        elif isinstance(mark, Band):
            shade: dict[str, Any] = {"color": colours["hue-0"], "alpha": 0.22, "linewidth": 0}
            axes.fill_between(mark.xs, mark.low, mark.high, label=mark.label, **shade)
        else:
            _draw_reference(axes, mark, colours["muted"])
    _set_axis(axes, "x", panel.x, None)
    _set_axis(axes, "y", panel.y, None if panel.y.names else common)
    if panel.y.names:
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")


def _draw_line(axes: Axes, line: Line, colours: Mapping[str, str]) -> None:
    hue = line.hue % NUM_HUES
    style: dict[str, Any] = {"color": colours[f"hue-{hue}"], "marker": MARKERS[hue], "label": line.label}
    dashes = DASHES[hue] if line.is_connected else "none"
    if line.weights:
        axes.plot(line.xs, line.ys, linestyle=dashes, color=style["color"], linewidth=1.2)
        axes.scatter(line.xs, line.ys, [max(12.0, 110 * weight) for weight in line.weights], **style)
        return
    errors = None
    if line.low:
        ends = zip(line.ys, line.low, line.high, strict=True)
        # An estimate may lie a rounding error outside its interval.
        errors = list(zip(*((max(y - low, 0.0), max(high - y, 0.0)) for y, low, high in ends), strict=True))
    axes.errorbar(line.xs, line.ys, errors, linestyle=dashes, elinewidth=1.3, capsize=2.5, **style)


def _draw_reference(axes: Axes, mark: Reference, colour: str) -> None:
    style: dict[str, Any] = {
        "color": colour,
        "linewidth": 1.1,
        "linestyle": (0, (2, 2)),
        "label": mark.label,
        "zorder": 1.5,
    }
    if mark.height is None:
        axes.axline((0, 0), slope=1, **style)
    else:
        axes.axhline(mark.height, **style)


def _set_axis(axes: Axes, name: str, axis: Axis, common: tuple[float, float] | None) -> None:
    scale, place = getattr(axes, f"set_{name}scale"), getattr(axes, f"{name}axis")
    if axis.is_logarithmic:
        scale("log", base=2)
        place.set_minor_locator(NullLocator())
    if axis.names:
        place.set_major_locator(FixedLocator(range(len(axis.names))))
        place.set_major_formatter(FuncFormatter(lambda value, _: axis.names[round(value)]))
        getattr(axes, f"set_{name}lim")(-0.5, len(axis.names) - 0.5)
    elif axis.ticks:
        place.set_major_locator(FixedLocator(list(axis.ticks)))
        place.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif not axis.is_logarithmic:
        place.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=_is_counted(axes, name)))
    limits = axis.limits or common
    if limits:
        getattr(axes, f"set_{name}lim")(limits)


def _is_counted(axes: Axes, name: str) -> bool:
    """Whether all lines have whole numbers there."""
    values = [value for line in axes.lines for value in getattr(line, f"get_{name}data")()]
    return name == "x" and all(float(value).is_integer() for value in values)


def _common_range(panels: Sequence[Panel]) -> tuple[float, float] | None:
    """Of the y axes of several panels that show the same, so that heights can be compared; None for others."""
    if len(panels) < 2 or len({panel.y for panel in panels}) > 1:
        return None
    marks = [mark for panel in panels for mark in panel.marks]
    values = [value for mark in marks if isinstance(mark, Line) for value in (*mark.ys, *mark.low, *mark.high)]
    values += [value for mark in marks if isinstance(mark, Band) for value in (*mark.low, *mark.high)]
    values += [mark.height for mark in marks if isinstance(mark, Reference) and mark.height is not None]
    if not values:
        return None
    margin = 0.06 * (max(values) - min(values)) or 0.1
    return min(values) - margin, max(values) + margin


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles, labels


def _for_html(text: str, label: str) -> str:
    """An SVG file as an element: without its own size, fonts, ids nobody refers to and rules for the whole page."""
    root = ElementTree.fromstring(text)
    size = [float(value) for value in root.attrib["viewBox"].split()[2:]]
    root.attrib.clear()
    root.attrib.update({"viewBox": f"0 0 {size[0]:g} {size[1]:g}", "role": "img", "aria-label": label})
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}style", f"{SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        if element.tag == f"{SVG}g":
            element.attrib.pop("id", None)
        if XLINK in element.attrib:
            element.attrib["href"] = element.attrib.pop(XLINK)
        if "style" in element.attrib:
            element.attrib["style"] = _style(element.attrib["style"])
        element.tag = element.tag.removeprefix(SVG)
        element.text, element.tail = (element.text or "").strip() or None, None
    out = ElementTree.tostring(root, encoding="unicode")
    for name, colour in PLACEHOLDERS.items():
        out = out.replace(colour, f"var(--{name})")
    return out


def _style(text: str) -> str:
    """Of an element; the page chooses the font's family."""
    text = re.sub(r"font: (?:(bold|\d+) )?([\d.]+px) [^;]*", r"font-weight: \1; font-size: \2", text)
    text = re.sub(r"font-family: [^;]*;? ?", "", text)
    return text.replace("font-weight: ;", "").strip()
