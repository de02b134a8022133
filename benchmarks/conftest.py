"""Hardware and versions in every result, and the models that benchmarks share."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from benchmarks.shapes import MID_SIZE
from twotower_spec import TwoTowerModel


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine_info |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@cache
def mid_size_model(dtype: str) -> TwoTowerModel:
    return TwoTowerModel.from_config(MID_SIZE, dtype=dtype)


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> TwoTowerModel:
    return mid_size_model(request.param)
