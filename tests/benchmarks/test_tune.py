import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import tune
from benchmarks.harness import benchmark_modules, in_order
from benchmarks.isolation import Isolated
from tests.benchmarks.toy import FakeClock
from twotower_kernels.compilation import OPS, Resources
from twotower_kernels.tuning import Settings

ROOT = Path(__file__).parents[2]

BLOCKS: list[Settings] = [{"BLOCK": block, "num_warps": 4} for block in (16, 8, 4)]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Path of the toy's table; it has two kernels, of which the benchmark covers one."""
    monkeypatch.setattr(tune, "candidates_of", lambda op: {"toy_kernel": BLOCKS, "uncovered": BLOCKS})
    monkeypatch.setattr(tune, "table_path", lambda op: tmp_path / "tuned.json")
    return tmp_path / "tuned.json"


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated() as process:
        yield process


def tune_toy(isolated: Isolated, seconds: float = 300) -> None:
    tuner = tune.Tuner("cpu", FakeClock(), isolated, [isolated], time.monotonic() + seconds)
    tune.tune("toy", "tests.benchmarks.toy", tuner)


def test_fastest_candidate_that_agrees_is_chosen(table: Path, isolated: Isolated) -> None:
    tune.write_table("toy", "by hand", {"toy_kernel": BLOCKS[0], "uncovered": BLOCKS[1]})
    tune_toy(isolated)
    written = json.loads(table.read_text())
    # A block of 4 is faster still, but its results are wrong.
    assert written["kernels"] == {"toy_kernel": BLOCKS[1], "uncovered": BLOCKS[1]}
    assert written["chosen_by"].startswith("measured on ") and written["chosen_by"].endswith(": toy_kernel (1 shapes)")


def test_experts_come_first_and_no_op_is_left_out() -> None:
    assert in_order(OPS)[0] == next(iter(benchmark_modules())) == "experts"
    assert in_order([*OPS, "an_op_to_come"])[-1] == "an_op_to_come" and set(in_order(OPS)) == set(OPS)


def test_table_stays_when_the_time_is_up(table: Path, isolated: Isolated) -> None:
    tune.write_table("toy", "by hand", {"toy_kernel": BLOCKS[0], "uncovered": BLOCKS[1]})
    before = table.read_text()
    tune_toy(isolated, seconds=-1)
    assert table.read_text() == before


def test_measured_table_is_not_replaced_by_a_guess(table: Path) -> None:
    tune.write_table("toy", "measured on NVIDIA Toy: toy_kernel (1 shapes)", {"toy_kernel": BLOCKS[2]})
    before = table.read_text()
    tune.rank("toy", replace=True)
    assert table.read_text() == before


def test_table_that_does_not_fit_the_candidates_is_complained_about(table: Path) -> None:
    tune.write_table("toy", "by hand", {"toy_kernel": {"BLOCK": 32, "num_warps": 4}, "renamed": BLOCKS[0]})
    assert tune.complaints("toy") == [
        "toy: kernel uncovered has no settings",
        "toy: renamed is no kernel of CANDIDATES",
        "toy: toy_kernel has {'BLOCK': 32, 'num_warps': 4}, which is not among its candidates",
    ]


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_is_launched_with_one_of_its_candidates(op: str) -> None:
    assert tune.complaints(op) == []
    assert tune.present_table(op)["chosen_by"]


def test_occupancy_follows_the_scarcest_resource() -> None:
    assert Resources(registers=32, shared_bytes=0, spill_bytes=0).occupancy(8, 90) == 1.0
    # 168 registers: three programs of four warps.
    assert Resources(registers=168, shared_bytes=0, spill_bytes=0).occupancy(4, 90) == 12 / 64
    assert Resources(registers=32, shared_bytes=100 << 10, spill_bytes=0).occupancy(8, 90) == 16 / 64
    assert Resources(registers=32, shared_bytes=100 << 10, spill_bytes=0).occupancy(8, 80) == 8 / 64


@pytest.mark.slow
def test_without_a_gpu_the_choice_is_one_of_the_candidates() -> None:
    # In a process of its own: in this one @triton.jit makes functions of the interpreter.
    code = "from benchmarks.tune import *; print(ranked(*sys.argv[1:]) in candidates_of(sys.argv[1])[sys.argv[2]])"
    op, kernel = "time_modulation", "gated_group_norm"
    done = subprocess.run(
        [sys.executable, "-c", code, op, kernel], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr
