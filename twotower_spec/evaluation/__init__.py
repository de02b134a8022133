"""Prompts and statistics that all benchmarks share."""

from twotower_spec.evaluation.datasets import DATASETS, Prompt, load_prompts
from twotower_spec.evaluation.statistics import (
    Comparison,
    Estimate,
    bootstrap_interval,
    median_and_spread,
)

__all__ = [
    "DATASETS",
    "Comparison",
    "Estimate",
    "Prompt",
    "bootstrap_interval",
    "load_prompts",
    "median_and_spread",
]
