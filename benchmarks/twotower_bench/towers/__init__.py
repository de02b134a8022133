"""Passes of both towers, timed beside the time of the bytes that they have to read."""

from twotower_bench.towers.clock import DeviceClock
from twotower_bench.towers.geometry import GEOMETRIES, first_layers, layers_that_fit, made_in_place
from twotower_bench.towers.measuring import PassTimes, measure
from twotower_bench.towers.passes import FilledPool, PassShape, TowerPass, planned
from twotower_bench.towers.profile import KernelTime, profiled

__all__ = [
    "GEOMETRIES",
    "DeviceClock",
    "FilledPool",
    "KernelTime",
    "PassShape",
    "PassTimes",
    "TowerPass",
    "first_layers",
    "layers_that_fit",
    "made_in_place",
    "measure",
    "planned",
    "profiled",
]
