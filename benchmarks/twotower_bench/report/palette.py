"""Colours, markers and dashes of plots, told apart without colour, too, and on light and dark ground."""

from __future__ import annotations

from collections.abc import Mapping

# Hue 0 is the grey of no speculation. The others were found by a search that kept each at least 3:1 against the ground,
# and all as far apart as it could for eyes with all cones and without those for red, green or blue (test_palette.py).
_NAMES = ("ground", "text", "muted", "grid", *(f"hue-{number}" for number in range(8)))
_LIGHT = "ffffff 1b2430 556070 dfe3e8 8b8d90 0c2f76 c87300 326a63 8c38ba 5c4a00 4f8ef7 5e142f"
_DARK = "14181e e6eaf0 a3adba 313945 dae5f7 5892fd ffbb58 227d00 995396 9e9d00 a5bbff fa76a1"
# By name of the CSS variable.
LIGHT: Mapping[str, str] = {name: f"#{colour}" for name, colour in zip(_NAMES, _LIGHT.split(), strict=True)}
DARK: Mapping[str, str] = {name: f"#{colour}" for name, colour in zip(_NAMES, _DARK.split(), strict=True)}

NUM_HUES = 8
MARKERS = ("s", "o", "^", "D", "v", "P", "X", "*")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    (0, (1, 1.5)), "-", (0, (5, 2)), (0, (3, 1.5, 1, 1.5)), (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 2)), "-"
)  # fmt: skip
