"""Colours, markers and dashes of plots, told apart without colour, too, and on light and dark ground."""

from __future__ import annotations

from collections.abc import Mapping

# Names are those of the CSS variables of template.html.j2, which has the colours of both schemes. The grey of no
# speculation, then the hues: found by a search that kept each at least 3:1 against the ground, and all as far apart as
# it could for eyes with all cones and without those for red, green or blue (tests/report/test_palette.py).
LIGHT: Mapping[str, str] = {
    "ground": "#ffffff",
    "text": "#1b2430",
    "muted": "#556070",
    "grid": "#dfe3e8",
    "hue-0": "#8b8d90",
    "hue-1": "#0c2f76",
    "hue-2": "#c87300",
    "hue-3": "#326a63",
    "hue-4": "#8c38ba",
    "hue-5": "#5c4a00",
    "hue-6": "#4f8ef7",
    "hue-7": "#5e142f",
}
DARK: Mapping[str, str] = {
    "ground": "#14181e",
    "text": "#e6eaf0",
    "muted": "#a3adba",
    "grid": "#313945",
    "hue-0": "#dae5f7",
    "hue-1": "#5892fd",
    "hue-2": "#ffbb58",
    "hue-3": "#227d00",
    "hue-4": "#995396",
    "hue-5": "#9e9d00",
    "hue-6": "#a5bbff",
    "hue-7": "#fa76a1",
}
# What SVG is drawn with; every one is replaced by its variable.
PLACEHOLDERS: Mapping[str, str] = {name: f"#f0e1{i:02x}" for i, name in enumerate(LIGHT)}

NUM_HUES = sum(name.startswith("hue-") for name in LIGHT)
MARKERS = ("s", "o", "^", "D", "v", "P", "X", "*")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    (0, (1, 1.5)), "-", (0, (5, 2)), (0, (3, 1.5, 1, 1.5)), (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 2)), "-"
)  # fmt: skip


def css_variables(colours: Mapping[str, str]) -> str:
    """Declarations of a scheme."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
