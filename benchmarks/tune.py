"""Chooses the settings of every kernel among its CANDIDATES: python -m benchmarks.tune

On a GPU by measuring the op's benchmark cases; elsewhere by what the compiled candidates need, which is a guess, is
named so in the table, and replaces no measured table.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, TypeVar

import torch
import typer

from benchmarks.clock import Clock, CudaClock
from benchmarks.harness import OURS, Systems, benchmark_modules, cases_of, in_order
from benchmarks.isolation import CallFailed, Isolated
from benchmarks.kernel_times import gpu_machine_info
from twotower_kernels.compilation import OPS, Variant, compile_variant
from twotower_kernels.tuning import Settings, Table, table_path, trying
from twotower_spec.files import write_atomically

# Compute capability that candidates are ranked for where there is no GPU.
CAPABILITY = 90
# With half of a multiprocessor's warps enough loads are in flight; more occupancy does not count.
ENOUGH_OCCUPANCY = 0.5
TRIAL_SECONDS = 120
# Number of processes that compile and check side by side; each has the inputs of a case on the device.
CHECKERS = 6
# A candidate slower than the best by this factor, over the cases so far, is not measured on the others.
HOPELESS = 1.3
# Relative difference of times below which they count as equal.
NOISE = 0.01
# First word of the description of a measured table.
MEASURED = "measured"
COMMA = ",\n"

Result = TypeVar("Result")


def candidates_of(op: str) -> dict[str, list[Settings]]:
    """Settings that an op's kernels may be launched with, by kernel."""
    candidates: dict[str, list[Settings]] = import_module(f"twotower_kernels.{op}.variants").CANDIDATES
    return candidates


def complaints(op: str) -> list[str]:
    """Faults of an op's table: kernels without settings, unknown kernels, settings that are no candidates."""
    candidates, chosen = candidates_of(op), present_table(op)["kernels"]
    wrong = [f"{op}: kernel {kernel} has no settings" for kernel in candidates if kernel not in chosen]
    wrong += [f"{op}: {kernel} is no kernel of CANDIDATES" for kernel in chosen if kernel not in candidates]
    wrong += [
        f"{op}: {kernel} has {settings}, which is not among its candidates"
        for kernel, settings in chosen.items()
        if settings not in candidates.get(kernel, [settings])
    ]
    return wrong


@dataclass(frozen=True)
class Trial:
    """One case with one candidate's settings; picklable, since it runs in another process."""

    op: str
    kernel: str
    candidate: Settings
    module: str
    index: int
    device: str

    def launch(self) -> Callable[[], object]:
        """Makes our op's call on the case, and calls it once."""
        call = made_systems(self.module, self.index, self.device)[OURS]
        call()
        return call


# The last case is cached, so that all candidates are timed on the same inputs.
@lru_cache(maxsize=1)
def made_systems(module: str, index: int, device: str) -> Systems:
    """Makes the systems of a case."""
    return cases_of(module, device)[index].make()


def agree(trial: Trial) -> bool:
    """Raises unless the systems of the case agree, and returns True; compiled kernels stay in Triton's cache."""
    with trying(trial.op, trial.kernel, trial.candidate):
        cases_of(trial.module, trial.device)[trial.index].make()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the device is shared with the other processes
    return True


def median_ms(trial: Trial, clock: Clock) -> float:
    """Measures the call, from a graph where it can be captured."""
    with trying(trial.op, trial.kernel, trial.candidate):
        call = trial.launch()
        with suppress(RuntimeError):
            call = clock.capture(call)
        return clock.time(call).median_ms


def launches(trial: Trial) -> bool:
    """Whether the case launches the kernel at all: a setting that no kernel has is then an error."""
    trial.launch()
    with trying(trial.op, trial.kernel, {"no_such_setting": 1}):
        try:
            trial.launch()
        except (KeyError, TypeError):
            return True
    return False


@dataclass(frozen=True)
class Tuner:
    """Tuner that measures candidates.

    Attributes:
        device: where the cases are.
        clock: how they are timed.
        timing: process that times, while the others wait.
        checking: processes that compile side by side and prove agreement, before anything is timed.
        end: monotonic time after which nothing is begun.
    """

    device: str
    clock: Clock
    timing: Isolated
    checking: Sequence[Isolated]
    end: float

    def best(self, op: str, kernel: str, module: str, present: Settings | None) -> tuple[Settings, int] | None:
        """Finds the candidate with the least geometric mean of times over the kernel's cases; also the number of cases.

        None where no case launches the kernel, no candidate is right on all cases, or time was up before the end.
        Settings that are as good at present, within the noise, stay.
        """
        candidates, indices = candidates_of(op)[kernel], self._cases(op, kernel, module)
        logs = dict.fromkeys(range(len(candidates)), 0.0) if indices else {}
        for done, index in enumerate(indices, 1):
            trials = {number: Trial(op, kernel, candidates[number], module, index, self.device) for number in logs}
            right = self._right(trials)
            times = {number: self._tried(self.timing, median_ms, trials[number], self.clock) for number in right}
            if time.monotonic() > self.end:
                print(f"{op}/{kernel}: the time was up", flush=True)
                return None
            logs = {number: logs[number] + math.log(ms) for number, ms in times.items() if ms}
            bar = min(logs.values(), default=0.0) + math.log(HOPELESS) * done
            logs = {number: log for number, log in logs.items() if log <= bar}
        if not logs:
            return None
        least = min(logs, key=logs.__getitem__)
        for number, log in logs.items():
            if candidates[number] == present and log <= logs[least] + NOISE * len(indices):
                least = number
        mean_us = math.exp(logs[least] / len(indices)) * 1e3
        print(f"{op}/{kernel}: {mean_us:.1f} µs in the mean of {len(indices)} shapes, {candidates[least]}", flush=True)
        return candidates[least], len(indices)

    def _cases(self, op: str, kernel: str, module: str) -> list[int]:
        """Finds the cases that name the kernel, by index; where none does, those that launch it."""
        cases = cases_of(module, self.device)
        named = [index for index, case in enumerate(cases) if case.kernel == kernel]
        every = [Trial(op, kernel, {}, module, index, self.device) for index in range(len(cases))]
        return named or [trial.index for trial in every if self._tried(self.timing, launches, trial)]

    def _right(self, trials: Mapping[int, Trial]) -> list[int]:
        """Finds the trials in which the systems agree, by number."""
        waiting, right = deque(trials), []

        def work(isolated: Isolated) -> None:
            with suppress(IndexError):  # none is left
                while True:
                    number = waiting.popleft()
                    if self._tried(isolated, agree, trials[number]):
                        right.append(number)

        with ThreadPoolExecutor(len(self.checking)) as pool:
            list(pool.map(work, self.checking))
        return sorted(right)

    def _tried(self, isolated: Isolated, function: Callable[..., Result], trial: Trial, *more: object) -> Result | None:
        """Calls the function in a process; None where it fails, or would begin too late."""
        if time.monotonic() > self.end:
            return None
        try:
            return isolated.call(function, trial, *more, seconds=TRIAL_SECONDS)
        except CallFailed as error:
            print(f"{trial.op}/{trial.kernel} {trial.candidate}, case {trial.index}: {error}", flush=True)
            return None


def variants_of(op: str, kernel: str) -> list[list[Variant]]:
    """Variants of the op that depend on the kernel's settings, for every candidate."""
    module, made = import_module(f"twotower_kernels.{op}.variants"), []
    for candidate in candidates_of(op)[kernel]:
        with trying(op, kernel, candidate):
            made.append(module.variants())
    depend = [len({_specialised(variant) for variant in same}) > 1 for same in zip(*made, strict=True)]
    return [[variant for variant, own in zip(variants, depend, strict=True) if own] for variants in made]


def _specialised(variant: Variant) -> str:
    constants = sorted((name, str(value)) for name, value in variant.constants.items())
    return f"{constants} {variant.num_warps} {variant.num_stages}"


def ranked(op: str, kernel: str) -> Settings:
    """Chooses the candidate that compiles best: no spills, then enough occupancy, then the larger block."""
    best: tuple[tuple[float, ...], Settings] | None = None
    for candidate, variants in zip(candidates_of(op)[kernel], variants_of(op, kernel), strict=True):
        needs = [(variant, compile_variant(variant, CAPABILITY)) for variant in variants]
        spills = sum(need.spill_bytes for _, need in needs)
        occupancy = min((need.occupancy(variant.num_warps, CAPABILITY) for variant, need in needs), default=1.0)
        block = math.prod(value for name, value in candidate.items() if name.startswith("BLOCK"))
        rank = (-spills, min(occupancy, ENOUGH_OCCUPANCY), block)
        if best is None or rank > best[0]:  # the first of equals
            best = rank, candidate
    if best is None:
        raise ValueError(f"{op}/{kernel} has no candidates; give it one")
    return best[1]


def present_table(op: str) -> Table:
    """Reads the table as it is; an empty one where there is none."""
    path = table_path(op)
    table: Table = json.loads(path.read_text()) if path.exists() else {"chosen_by": "", "kernels": {}}
    return table


def write_table(op: str, chosen_by: str, kernels: dict[str, Settings]) -> None:
    """Replaces an op's table, a line for each kernel."""
    lines = [f"    {json.dumps(kernel)}: {json.dumps(kernels[kernel], sort_keys=True)}" for kernel in sorted(kernels)]
    text = f'{{\n  "chosen_by": {json.dumps(chosen_by)},\n  "kernels": {{\n{COMMA.join(lines)}\n  }}\n}}\n'
    write_atomically(table_path(op), text, option="table")


def rank(op: str, replace: bool) -> None:
    """Writes an op's table without measuring; replaces one that fits only with `replace`, and a measured one never."""
    if present_table(op)["chosen_by"].startswith(MEASURED):
        print(f"{op}: its table was measured on a GPU and stays")
        return
    if not (replace or complaints(op)):
        print(f"{op}: its table fits the candidates and stays; --replace ranks them anew")
        return
    kernels = {kernel: ranked(op, kernel) for kernel in candidates_of(op)}
    compiler = f"compiled for sm_{CAPABILITY} by triton {version('triton')}"
    write_table(op, f"resources of the candidates {compiler}; not measured on a GPU", kernels)
    print(f"{op}: {kernels}", flush=True)


def tune(op: str, module: str, tuner: Tuner) -> None:
    """Writes an op's table anew with every kernel that was measured; others keep their settings."""
    before, shapes, info = present_table(op)["kernels"], dict[str, int](), gpu_machine_info()
    kernels = {
        kernel: before[kernel] if before.get(kernel) in candidates else ranked(op, kernel)
        for kernel, candidates in candidates_of(op).items()
    }
    named = ("driver", "torch", "triton", "commit")
    hardware = ", ".join([str(info["gpu"]), *(f"{name} {info[name]}" for name in named if info[name])])
    for kernel in kernels:
        if found := tuner.best(op, kernel, module, before.get(kernel)):
            kernels[kernel], shapes[kernel] = found
            covered = ", ".join(f"{kernel} ({count} shapes)" for kernel, count in shapes.items())
            write_table(op, f"{MEASURED} on {hardware}: {covered}", kernels)
    print(f"{op}: {kernels}, measured: {', '.join(shapes) or 'nothing'}", flush=True)


def main(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only look whether the tables fit CANDIDATES.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Without a GPU: rank also where a table fits.")] = False,
    seconds: Annotated[float, typer.Option(help="Kernels that would be measured later keep their settings.")] = 540,
) -> None:
    """Writes the tables of settings."""
    unknown = [name for name in op or [] if name not in OPS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)} has no kernels; choose among {', '.join(OPS)}")
    if check:
        wrong = [complaint for name in op or OPS for complaint in complaints(name)]
        print(*wrong, sep="\n", file=sys.stderr)
        raise typer.Exit(bool(wrong))
    modules, end = benchmark_modules(), time.monotonic() + seconds
    with ExitStack() as processes:
        cuda, timing = torch.cuda.is_available(), processes.enter_context(Isolated())
        checking = [processes.enter_context(Isolated()) for _ in range(min(CHECKERS, os.cpu_count() or 1))]
        tuner = Tuner("cuda", CudaClock(5, 30), timing, checking, end)
        for name in op or in_order(OPS):
            if cuda and name in modules:
                tune(name, modules[name], tuner)
            else:
                rank(name, replace)


if __name__ == "__main__":
    typer.run(main)
