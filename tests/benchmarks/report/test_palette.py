"""Colours stand out from the ground and from each other, whatever cones the eye has."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from twotower_bench.report.palette import DARK, DASHES, LIGHT, MARKERS, NUM_HUES

Floats = NDArray[np.float64]

# From linear sRGB to what is seen without one kind of cone. Source: Machado, Oliveira and Fernandes 2009, "A
# physiologically-based model for simulation of color vision deficiency", severity 1.
EYES = {
    "all cones": np.eye(3),
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
# Source: Ottosson 2020, "A perceptual color space for image processing" (Oklab).
TO_CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.793617785, -0.0040720468],
    [1.9779984951, -2.428592205, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.808675766],
]
# About five times what is just noticed.
LEAST_DISTANCE = 0.1
# Of WCAG 2.1 for graphics.
LEAST_CONTRAST = 3.0


def linear(colour: str) -> Floats:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(rgb: Floats) -> Floats:
    seen: Floats = np.array(TO_LAB) @ np.cbrt(np.array(TO_CONES) @ np.clip(rgb, 0, 1))
    return seen


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("eye", EYES)
def test_hues_are_apart_for_every_eye(scheme: Mapping[str, str], eye: str) -> None:
    seen = {name: oklab(np.array(EYES[eye]) @ linear(colour)) for name, colour in scheme.items() if "hue" in name}
    pairs = {(a, b): float(np.linalg.norm(seen[a] - seen[b])) for a, b in combinations(seen, 2)}
    assert {pair: distance for pair, distance in pairs.items() if distance < LEAST_DISTANCE} == {}


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_hues_stand_out_from_the_ground(scheme: Mapping[str, str]) -> None:
    brightness = {name: float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for name, colour in scheme.items()}
    ground = brightness["ground"]
    for name in (name for name in scheme if "hue" in name):
        low, high = sorted((brightness[name], ground))
        assert (high + 0.05) / (low + 0.05) >= LEAST_CONTRAST, name


def test_markers_and_dashes_differ_where_colours_cannot_be_seen() -> None:
    assert len(set(MARKERS)) == len(MARKERS) == len(DASHES) == NUM_HUES
