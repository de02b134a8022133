"""Transfers between host and device: what a copy holds, and that nobody reads one that has not arrived."""

from __future__ import annotations

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


def test_copies_that_nobody_waits_for_are_made_in_one_place() -> None:
    """To the host such a copy returns before its values are there, which no test on a CPU would show."""
    places = [ROOT / "twotower_spec", ROOT / "kernels", ROOT / "vllm_plugin", ROOT / "benchmarks" / "twotower_bench"]
    users = [file.name for place in places for file in place.rglob("*.py") if "non_blocking" in file.read_text()]
    assert users == ["transfer.py"]
