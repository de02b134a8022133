"""Hardware and versions in every result, and the models that benchmarks share."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from benchmarks.shapes import MID_SIZE
from twotower_spec import TwoTowerModel
from twotower_spec.machine import machine_info as describe


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= describe()


@cache
def mid_size_model(dtype: str) -> TwoTowerModel:
    return TwoTowerModel.from_config(MID_SIZE, dtype=dtype)


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> TwoTowerModel:
    return mid_size_model(request.param)
