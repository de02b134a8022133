"""Cases of kernel benchmarks: each is one shape, with our op and its rivals on the same inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import twotower_kernels

# Implementations by name, ours first; each call does the whole work once.
Systems = dict[str, Callable[[], object]]

OURS = "twotower_kernels"

# By their share of a round; experts alone are nine tenths of a step.
MOST_TIME_FIRST = (
    "experts",
    "block_scan",
    "block_attention",
    "time_modulation",
    "linear",
    "unmasking",
    "noise",
    "acceptance",
)


@dataclass(frozen=True)
class Case:
    """One shape of an op.

    Attributes:
        op: folder of the op.
        kernel: the kernel that takes most of the time, by its name in the table of settings; empty where there is none.
        shape: as a reader wants to see it.
        bytes_moved: what has to be read and written, whoever does it.
        make: makes the inputs, proves that the systems agree on them, and gives the systems.
    """

    op: str
    kernel: str
    shape: str
    bytes_moved: int
    make: Callable[[], Systems]


def in_order(ops: Iterable[str]) -> list[str]:
    """Sorts ops by what they matter, so that a run that ends early has measured the most important ones."""
    return sorted(
        ops, key=lambda op: (MOST_TIME_FIRST.index(op) if op in MOST_TIME_FIRST else len(MOST_TIME_FIRST), op)
    )


def benchmark_modules() -> dict[str, str]:
    """Finds the module `bench_<op>.py` of every op that has one, by op; the most important one first."""
    ops = in_order(file.parent.name for file in Path(twotower_kernels.__file__).parent.glob("*/op.py"))
    return {op: f"benchmarks.bench_{op}" for op in ops if Path(__file__).with_name(f"bench_{op}.py").exists()}


def cases_of(module: str, device: str) -> list[Case]:
    """Makes the cases of a benchmark."""
    cases: list[Case] = import_module(module).cases(torch.device(device))
    return cases


def one_by_one(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrises a benchmark `(benchmark, case)` by cases."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.shape) for case in cases])


def side_by_side(benchmark: BenchmarkFixture, case: Case, rounds: int = 20) -> None:
    """Times ours with pytest-benchmark, and the rivals in the same rounds; ratios go into the result's extra info.

    Systems take turns, so that the noise of the machine reaches all of them.
    """
    systems = case.make()
    seconds: dict[str, list[float]] = {name: [] for name in systems}

    def timed(name: str) -> None:
        start = time.perf_counter()
        systems[name]()
        seconds[name].append(time.perf_counter() - start)

    def others() -> None:
        for name in systems:
            if name != OURS:
                timed(name)

    benchmark.group = f"{case.op}, {case.shape}"
    benchmark.pedantic(timed, args=(OURS,), setup=others, rounds=rounds, warmup_rounds=2)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info |= {
        "shape": case.shape,
        "gb_per_s": round(case.bytes_moved / median[OURS] / 1e9, 2),
        **{f"speed-up over {name}": round(median[name] / median[OURS], 2) for name in systems if name != OURS},
    }
