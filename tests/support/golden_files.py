"""Golden fixtures: tiny checkpoints and the results of the published code on them (tests/golden/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from twotower_spec import TwoTowerModel

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("T1", "T2")

# Absolute tolerances of tests/golden/README.md for float32 runs with upcast weights, and why.
CONTEXT_TOLERANCE = 1e-3  # float32 spread of the published code is about 2e-5 at values up to about 15
TIME_TOLERANCE = 2e-3  # arguments up to 1000 in float32 cost about 5e-5 in the sinusoid
DENOISER_TOLERANCE = 5e-3  # the above, amplified to 1.5e-3 at worst
FLOAT64_TOLERANCE = 1e-9  # a second implementation reaches 1e-13


def checkpoint(name: str) -> Path:
    return GOLDEN / name / "ckpt"


@cache
def golden_model(name: str, dtype: str = "float32") -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(checkpoint(name), dtype=dtype)


@cache
def golden_tensors(name: str, file: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / f"{file}.safetensors")


@cache
def generation_cases(name: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((GOLDEN / name / "generation.json").read_text())
    return cases


def generation_options(case: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the call that made a generation case."""
    names = ("max_new_tokens", "eos_token_id", "block_size", "steps_per_block", "confidence_threshold", "mask_token_id")
    return {name: case[name] for name in names if name in case}
