"""Every kernel benchmark on a GPU, in one command: python -m benchmarks.kernel_times

Each case runs in a process that is replaced when a kernel breaks it; the failure stands in the table. A run over all
ops writes the measured table of kernels/README.md.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.clock import Clock, CudaClock, Timing, copy_gb_per_s
from benchmarks.harness import OURS, benchmark_modules, cases_of
from benchmarks.isolation import CallFailed, Isolated, in_one_line
from benchmarks.readme import README, markdown_table, write_section
from twotower_bench.gpu.machine import driver_version
from twotower_spec.files import write_atomically
from twotower_spec.machine import machine_info

SECTION = "measured"
# Limit for one case with its compilations. None takes that long, and a kernel that hangs costs one case only.
CASE_SECONDS = 150
NO_GPU = "No CUDA device is here: kernels are timed on a GPU only. On a CPU: make bench ARGS=benchmarks/bench_<op>.py"


@dataclass(frozen=True)
class Measurement:
    """Measurements of one system on one case.

    Attributes:
        call: called as a user would, None where it failed.
        graph: replayed from a CUDA graph, None where it could not be captured.
        extra_bytes: memory that a call needs beyond its inputs, results included.
        failure: why something is missing; empty where nothing is.
    """

    call: Timing | None = None
    graph: Timing | None = None
    extra_bytes: int | None = None
    failure: str = ""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one case; where it failed as a whole, `systems` is empty and `failure` says why."""

    op: str
    shape: str
    bytes_moved: int = 0
    systems: dict[str, Measurement] = field(default_factory=dict)
    failure: str = ""

    @property
    def ours(self) -> Measurement:
        """Measurements of our op."""
        return self.systems.get(OURS, Measurement())

    @property
    def rivals(self) -> dict[str, Measurement]:
        """Measurements of the rivals, by name."""
        return {name: measured for name, measured in self.systems.items() if name != OURS}

    def gb_per_s(self, measured: Measurement) -> float | None:
        """Gigabytes moved per second, of those that have to be; from the graph where there is one."""
        timing = measured.graph or measured.call
        return self.bytes_moved / timing.median_ms / 1e6 if timing else None


def measure(call: Callable[[], object], clock: Clock) -> Measurement:
    """Measures one system; what cannot be measured is left out, with the reason."""
    try:
        timing, extra_bytes = clock.time(call), clock.extra_bytes(call)
    except Exception as error:
        return Measurement(failure=in_one_line(error))
    try:
        return Measurement(timing, clock.time(clock.capture(call)), extra_bytes)
    except Exception as error:
        return Measurement(timing, None, extra_bytes, f"no graph: {in_one_line(error)}")


def measure_case(module: str, index: int, device: str, clock: Clock) -> dict[str, Measurement]:
    """Measures all systems of one case."""
    systems = cases_of(module, device)[index].make()
    return {name: measure(call, clock) for name, call in systems.items()}


def measure_all(
    modules: dict[str, str], device: str, clock: Clock, isolated: Isolated, seconds: float
) -> Iterator[Outcome]:
    """Measures every case of the benchmarks in `modules` (by op); those after `seconds` are reported as not run."""
    end = time.monotonic() + seconds
    for op, module in modules.items():
        try:
            cases = cases_of(module, device)
        except Exception as error:
            yield Outcome(op, "all", failure=in_one_line(error))
            continue
        for index, case in enumerate(cases):
            left = end - time.monotonic()
            outcome = partial(Outcome, op, case.shape, case.bytes_moved)
            if left <= 0:
                yield outcome(failure="not run, the time was up")
                continue
            try:
                systems = isolated.call(measure_case, module, index, device, clock, seconds=min(left, CASE_SECONDS))
                yield outcome(systems)
            except CallFailed as error:
                yield outcome(failure=str(error))


@cache
def gpu_machine_info() -> dict[str, str | int | None]:
    """Extends `machine_info` by the driver and the versions of Triton and of the rivals."""
    versions = {name: _version(name) for name in ("triton", "vllm", "flashinfer-python", "mamba-ssm")}
    info = machine_info() | {"driver": driver_version(), "cuda": torch.version.cuda, **versions}
    # A copy of the tree without git, as on a lent machine, is told its commit.
    return info | {"commit": info["commit"] or os.environ.get("COMMIT")}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def speed_ups(outcome: Outcome) -> dict[str, dict[str, float]]:
    """Speed-up of ours over a rival, called and in a graph, where both were measured."""
    ratios: dict[str, dict[str, float]] = {}
    for name, rival in outcome.rivals.items():
        pairs = {"call": (rival.call, outcome.ours.call), "graph": (rival.graph, outcome.ours.graph)}
        ratios[name] = {how: a.median_ms / b.median_ms for how, (a, b) in pairs.items() if a and b}
    return ratios


def as_json(
    outcomes: list[Outcome], machine: dict[str, str | int | None], copied: float | None, command: str
) -> dict[str, object]:
    """Converts an outcome, everything that was measured, to a JSON object."""
    cases = []
    for outcome in outcomes:
        systems = {}
        for name, measured in outcome.systems.items():
            rate = outcome.gb_per_s(measured)
            systems[name] = {
                "call": measured.call and measured.call._asdict(),
                "graph": measured.graph and measured.graph._asdict(),
                "extra_bytes": measured.extra_bytes,
                "gb_per_s": rate,
                "of_copy": rate / copied if rate and copied else None,
                "failure": measured.failure,
            }
        cases.append(asdict(outcome) | {"systems": systems, "speed_up_over": speed_ups(outcome)})
    return {"machine": machine, "command": command, "copy_gb_per_s": copied, "cases": cases}


HEADER = ("op", "shape", "MB", "µs", "in a graph, µs", "GB/s", "of copy", "times faster than (in a graph)", "extra MiB")


def readme_row(outcome: Outcome, copied: float | None) -> list[str]:
    """Formats one case as a row of the table."""
    ours, rate = outcome.ours, outcome.gb_per_s(outcome.ours)
    megabytes = f"{outcome.bytes_moved / 1e6:.3g}" if outcome.bytes_moved else ""
    failure = outcome.failure or (ours.failure if ours.call is None else "")
    if failure:
        return [outcome.op, outcome.shape, megabytes, f"failed: {failure}", *[""] * (len(HEADER) - 4)]
    ratios = speed_ups(outcome)
    faster = [f"{name}: {_ratio(ratios[name], rival)}" for name, rival in outcome.rivals.items()]
    extra = [_mebibytes(measured.extra_bytes) for measured in (ours, *outcome.rivals.values())]
    return [
        outcome.op,
        outcome.shape,
        megabytes,
        _microseconds(ours.call),
        _microseconds(ours.graph),
        f"{rate:.0f}" if rate else "",
        f"{rate / copied:.0%}" if rate and copied else "",
        "; ".join(faster),
        " / ".join(extra),
    ]


def _ratio(ratios: dict[str, float], rival: Measurement) -> str:
    if "call" not in ratios:
        return f"failed ({rival.failure})"
    return f"{ratios['call']:.2f} ({ratios['graph']:.2f})" if "graph" in ratios else f"{ratios['call']:.2f} (no)"


def _microseconds(timing: Timing | None) -> str:
    return f"{timing.median_ms * 1e3:.1f}" if timing else "no"


def _mebibytes(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else f"{num_bytes / 2**20:.3g}"


def readme_section(
    outcomes: list[Outcome], machine: dict[str, str | int | None], copied: float | None, command: str
) -> str:
    """Formats the measured table, with the hardware above it."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "vllm") if machine.get(name))
    copy = f"a copy inside its memory moves {copied:.0f} GB/s" if copied else "the copy could not be measured"
    return "\n".join(
        [
            f"{machine.get('gpu') or 'no GPU'}, driver {machine.get('driver')}; {versions}; "
            f"commit {machine.get('commit')}; `{command}`; {copy} (read and written).",
            "",
            "Medians, the L2 cache flushed before each call. MB is what has to be read and written; GB/s and the share",
            "of a copy's speed are from the graph where there is one. Extra memory is of ours and then of each rival.",
            "",
            markdown_table(HEADER, (readme_row(outcome, copied) for outcome in outcomes)),
        ]
    )


def console_table(outcomes: list[Outcome], copied: float | None) -> Table:
    """Makes a table for the terminal, with a line for every system."""
    table = Table(
        "op", "shape", "system", "µs (20 % to 80 %)", "in a graph, µs", "GB/s", "of copy", "extra MiB", "failure"
    )
    for outcome in outcomes:
        if not outcome.systems:
            table.add_row(outcome.op, outcome.shape, *[""] * 6, outcome.failure)
        for name, measured in outcome.systems.items():
            timing, rate = measured.call, outcome.gb_per_s(measured)
            spread = f" ({timing.low_ms * 1e3:.1f} to {timing.high_ms * 1e3:.1f})" if timing else ""
            table.add_row(
                outcome.op,
                outcome.shape,
                name,
                _microseconds(timing) + spread,
                _microseconds(measured.graph),
                f"{rate:.0f}" if rate else "",
                f"{rate / copied:.0%}" if rate and copied else "",
                _mebibytes(measured.extra_bytes),
                measured.failure,
            )
    return table


def chosen_modules(ops: list[str] | None) -> dict[str, str]:
    """Selects the benchmarks of the named ops, or of all."""
    modules = benchmark_modules()
    unknown = [op for op in ops or [] if op not in modules]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)} has no benchmark; choose among {', '.join(modules)}")
    return {op: modules[op] for op in ops or modules}


def main(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A third of the repetitions.")] = False,
    seconds: Annotated[float, typer.Option(help="Cases that would start later are not run.")] = 540,
    json_file: Annotated[Path, typer.Option("--json", help="All figures.")] = Path(".benchmarks/kernels.json"),
) -> None:
    """Measures, prints a table and writes all figures; a full run over all ops writes kernels/README.md's table."""
    modules = chosen_modules(op)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        raise typer.Exit(2)
    start = time.monotonic()
    command = shlex.join(["python", "-m", "benchmarks.kernel_times", *sys.argv[1:]])
    clock, console, machine = CudaClock(3, 20) if quick else CudaClock(), Console(width=200), gpu_machine_info()
    outcomes: list[Outcome] = []
    with Isolated() as isolated:
        try:
            copied = isolated.call(copy_gb_per_s, clock, seconds=CASE_SECONDS)
        except CallFailed as error:
            copied = None
            console.print(f"copy: {error}")
        for outcome in measure_all(modules, "cuda", clock, isolated, seconds - (time.monotonic() - start)):
            outcomes.append(outcome)
            print(*(cell for cell in readme_row(outcome, copied) if cell), sep=" | ", flush=True)
            # Written after every case, so that measurements last even if the machine is taken away.
            json_file.parent.mkdir(parents=True, exist_ok=True)
            figures = as_json(outcomes, machine, copied, command)
            write_atomically(json_file, json.dumps(figures, indent=1) + "\n")
    console.print(console_table(outcomes, copied))
    print(f"all figures: {json_file}")
    if op or quick:
        print(f"{README} stays as it is; a run without --op and --quick writes its table")
    else:
        write_section(SECTION, readme_section(outcomes, machine, copied, command))
    raise typer.Exit(any(outcome.ours.call is None for outcome in outcomes))


if __name__ == "__main__":
    typer.run(main)
