"""Transfers between host and device: what a copy holds, and that nobody reads one that has not arrived."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import torch

from twotower_spec.state.transfer import HostCopy, Moment, moved, to_device

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_a_copy_holds_what_its_tensors_held() -> None:
    numbers, flags = torch.arange(3), torch.tensor([True])
    copy = HostCopy(numbers, flags)
    numbers.zero_()
    assert copy.landed
    assert [one.tolist() for one in copy.read()] == [[0, 1, 2], [True]]


def test_seconds_lie_between_moments() -> None:
    first = Moment(CPU)
    second = Moment(CPU)
    assert first.passed and first.seconds_until(second) >= 0 >= second.seconds_until(first)


def test_tensors_keep_their_values_on_the_way() -> None:
    assert moved(torch.arange(3), CPU, torch.float64).tolist() == [0.0, 1.0, 2.0]
    assert to_device(np.array([[1, 2]], dtype=np.int32), CPU).dtype == torch.int32
    assert to_device([[1, 2], [3, 4]], CPU).tolist() == [[1, 2], [3, 4]]
    assert to_device([0, 1], CPU, torch.float32).dtype == torch.float32


def test_no_numbers_are_put_on_a_device_by_a_copy_that_waits_for_it() -> None:
    """`torch.tensor(numbers, device=...)` is one on CUDA; training and trials of kernels may."""
    waiting = []
    for place in (ROOT / "twotower_spec", ROOT / "vllm_plugin"):
        for file in place.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                makes = isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.tensor", "torch.as_tensor")
                if makes and "training" not in file.parts and any(one.arg == "device" for one in node.keywords):
                    waiting.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert waiting == []


def test_copies_that_nobody_waits_for_are_made_in_two_places() -> None:
    """To the host such a copy returns before its values are there, which no test on a CPU would show.

    One is where checkpoints are read, which comes before the state and imports nothing of it.
    """
    places = [ROOT / "twotower_spec", ROOT / "kernels", ROOT / "vllm_plugin", ROOT / "benchmarks" / "twotower_bench"]
    users = {file.name for place in places for file in place.rglob("*.py") if "non_blocking" in file.read_text()}
    assert users == {"shards.py", "transfer.py"}
