"""Both towers: arithmetic only, state goes in and comes out through a `Prefix`."""

from twotower_spec.towers.context import ContextTower
from twotower_spec.towers.denoiser import DenoiserTower
from twotower_spec.towers.prefix import Prefix

__all__ = ["ContextTower", "DenoiserTower", "Prefix"]
