"""Layers as arithmetic, one file each: no state, no order of layers."""

from twotower_spec.towers.layers.attention import Attention
from twotower_spec.towers.layers.mamba2 import Mamba2
from twotower_spec.towers.layers.moe import DenseMLP, MixtureOfExperts

__all__ = ["Attention", "DenseMLP", "Mamba2", "MixtureOfExperts"]
