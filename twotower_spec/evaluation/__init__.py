"""What every benchmark shares: prompts and statistics."""

from twotower_spec.evaluation.datasets import DATASETS, Prompt, load_prompts
from twotower_spec.evaluation.statistics import (
    Comparison,
    Interval,
    Spread,
    bootstrap_interval,
    median_and_spread,
)

__all__ = [
    "DATASETS",
    "Comparison",
    "Interval",
    "Prompt",
    "Spread",
    "bootstrap_interval",
    "load_prompts",
    "median_and_spread",
]
