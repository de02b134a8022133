"""Marks of legends in HTML: small SVG elements that match what matplotlib draws."""

from __future__ import annotations

import numpy as np
from matplotlib.markers import MarkerStyle

from twotower_bench.report.document import Band, Bars, Mark, Reference
from twotower_bench.report.palette import DASHES, MARKERS, NUM_HUES

WIDTH, HEIGHT = 30, 14


def swatch(mark: Mark) -> str:
    """A mark as an SVG element."""
    return f'<svg class="swatch" viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">{_content(mark)}</svg>'


def _content(mark: Mark) -> str:
    if isinstance(mark, Band):
        return f'<rect width="{WIDTH}" height="{HEIGHT}" style="fill: var(--hue-0); fill-opacity: 0.22"/>'
    if isinstance(mark, Reference):
        return '<path d="M0 7H30" style="stroke: var(--muted); stroke-width: 1.3; stroke-dasharray: 2.6 2.6"/>'
    hue = mark.hue % NUM_HUES
    colour = f"var(--hue-{hue})"
    if isinstance(mark, Bars):
        return f'<rect x="8" width="14" height="14" style="fill: {colour}"/>'
    marker = f'<path d="{_outline(MARKERS[hue])}" style="fill: {colour}"/>'
    if not mark.is_connected:
        return marker
    dashes = DASHES[hue]
    pattern = "" if isinstance(dashes, str) else " ".join(f"{1.8 * part:g}" for part in dashes[1])
    line = f"stroke: {colour}; stroke-width: 1.8" + (f"; stroke-dasharray: {pattern}" if pattern else "")
    return f'<path d="M0 7H30" style="{line}"/>{marker}'


def _outline(marker: str) -> str:
    """One of matplotlib's markers in the middle."""
    style = MarkerStyle(marker)
    polygons = style.get_path().transformed(style.get_transform()).to_polygons()
    points = np.concatenate([np.asarray(polygon, dtype=float) for polygon in polygons])
    places = points * (8, -8) + (WIDTH / 2, HEIGHT / 2)
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places.tolist()) + "Z"
