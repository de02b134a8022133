"""Nemotron-Labs-TwoTower: both towers, their state, and generation; the core of the vLLM block drafter."""

from twotower_spec.config import DiffusionConfig, TwoTowerConfig
from twotower_spec.errors import ArgumentError, CheckpointError, ConfigError, StateFullError, TwoTowerError
from twotower_spec.generation import CommittedBlock, GenerationOptions, GenerationResult
from twotower_spec.model import TwoTowerModel

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "CommittedBlock",
    "ConfigError",
    "DiffusionConfig",
    "GenerationOptions",
    "GenerationResult",
    "StateFullError",
    "TwoTowerConfig",
    "TwoTowerError",
    "TwoTowerModel",
]
