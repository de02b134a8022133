"""Hardware and versions in every result, and the models that benchmarks share."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.shapes import MID_SIZE
from twotower_spec import TwoTowerModel
from twotower_spec.machine import machine_info as describe


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= describe()


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@cache
def mid_size_model(dtype: str, device: str) -> TwoTowerModel:
    return TwoTowerModel.from_config(MID_SIZE, dtype=dtype, context_device=device)


@pytest.fixture(params=[f"{dtype}-{device}" for device in DEVICES for dtype in ("float32", "bfloat16")])
def model(request: pytest.FixtureRequest) -> TwoTowerModel:
    return mid_size_model(*request.param.split("-"))
