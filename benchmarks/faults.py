"""The matrix of faults: python -m benchmarks.faults, half an hour of a core; tables in docs/faults.md.

Rows are written as soon as they are known, and a run that was stopped goes on with its file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, get_args

import typer

from benchmarks.readme import markdown_table, write_section
from twotower_bench.child_process import ended_by_signals
from twotower_bench.cli.tables import print_table
from twotower_bench.environment import Runner, engine_environment, on_runner
from twotower_bench.faults.cells import Seen
from twotower_bench.faults.disks import disk_trials
from twotower_bench.faults.document import COLUMNS, TRIAL_COLUMNS, rows_of, summary, trial_rows
from twotower_bench.faults.engine import cells_of
from twotower_bench.faults.matrix import run_cells
from twotower_bench.faults.servers import process_trials, start_trials
from twotower_bench.faults.trials import Trial
from twotower_bench.fork_server import ForkServer
from twotower_bench.measurement_file import VLLM, MeasurementFile
from twotower_spec.machine import commit, describe_machine
from twotower_spec.terminal import Terminal

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "faults.md"
ROWS = ROOT / ".benchmarks" / "faults.jsonl"
# vLLM's model runner V2 runs on a CPU in Triton's interpreter, with Triton told that there is a backend.
TRITON_ON_CPU = {"PYTHONPATH": str(ROOT / "tests" / "support" / "v2_on_cpu"), "TRITON_INTERPRET": "1"}


class Part(StrEnum):
    """A part of the trials."""

    V1 = "V1"
    V2 = "V2"
    SERVERS = "servers"
    DISKS = "disks"


TITLES = {
    Part.V1: "Model runner V1",
    Part.V2: "Model runner V2",
    Part.SERVERS: "Processes of a server, and its drafter's files",
    Part.DISKS: "Full and read-only disks",
}


def main(
    part: Annotated[list[Part] | None, typer.Argument(help="Parts that are run; default: all.")] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Rows, one for every cell.")] = ROWS,
    only_tables: Annotated[
        bool, typer.Option("--only-tables", help="Runs nothing: tables of what the file has.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Begin the file anew.")] = False,
    hang: Annotated[float, typer.Option(help="Seconds for which a call hangs.")] = 5.0,
) -> None:
    """Puts every fault into real engines and servers; exit code 1 where something does not hold."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    file = MeasurementFile[Seen | Trial](["faults", commit()], {"cell": Seen, "trial": Trial}, _key, VLLM)
    console, wanted = Terminal(), [] if only_tables else part or list(Part)
    with ended_by_signals(), file.opened(json_file, overwrite):
        for one in wanted:
            console.print(TITLES[one], style="bold")
            for found in _found(one, file.found, hang):
                file.keep(found)
                console.print(_line(found), soft_wrap=True)
    tables = {one: _of_part(one, list(file.found.values())) for one in Part}
    for one, rows in tables.items():
        print_table(console, *_columns_and_rows(one, rows))
    everything = list(file.found.values())
    console.print(summary(everything))
    write_section("matrix", _markdown(tables, file), DOCUMENT)
    raise typer.Exit(any(one.outcome == "failed" for one in everything))


def _key(found: Seen | Trial) -> Hashable:
    return found.cell if isinstance(found, Seen) else found.what


def _found(part: Part, known: Mapping[Hashable, object], hang_s: float) -> Iterator[Seen | Trial]:
    """Runs those cells of a part that the file does not have; of servers and disks all."""
    if part is Part.DISKS:
        yield from disk_trials()
        return
    if part is Part.SERVERS:
        for runner in get_args(Runner):
            with _forking(runner) as (fork_server, environment):
                for trial in process_trials(fork_server, environment):
                    yield replace(trial, what=f"{runner}: {trial.what}")
                if runner == "V1":  # drafters are read before a runner is made
                    yield from start_trials(fork_server, environment)
        return
    left = [one for one in cells_of(part.value) if one not in known]
    if left:
        runner = "V2" if part is Part.V2 else "V1"
        with _forking(runner) as (fork_server, environment):
            yield from run_cells(left, fork_server, environment, hang_s=hang_s)


@contextmanager
def _forking(runner: Runner) -> Iterator[tuple[ForkServer, dict[str, str]]]:
    """A process that engines on a runner are forked from, and their variables."""
    imports = TRITON_ON_CPU if runner == "V2" else {}
    environment = {**engine_environment(), **imports, "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1"}
    with (
        TemporaryDirectory(prefix="faults-") as folder,
        closing(ForkServer(Path(folder), environment)) as fork_server,
    ):
        yield fork_server, {**environment, **on_runner(runner)}


def _line(found: Seen | Trial) -> str:
    name = f"{found.cell.stage}, {found.cell.kind}, {found.cell.when}" if isinstance(found, Seen) else found.what
    return f"{found.outcome:6}  {name}" + (f": {'; '.join(found.faults)}" if found.faults else "")


def _of_part(part: Part, found: Sequence[Seen | Trial]) -> list[dict[str, str]]:
    if part in (Part.V1, Part.V2):
        return rows_of([one for one in found if isinstance(one, Seen) and one.cell.runner == part.value])
    on_disks = part is Part.DISKS
    return trial_rows([one for one in found if isinstance(one, Trial) and (" disk: " in one.what) is on_disks])


def _columns_and_rows(part: Part, rows: list[dict[str, str]]) -> tuple[Sequence[str], dict[str, list[dict[str, str]]]]:
    return COLUMNS if part in (Part.V1, Part.V2) else TRIAL_COLUMNS, {TITLES[part]: rows}


def _markdown(tables: Mapping[Part, list[dict[str, str]]], file: MeasurementFile[Seen | Trial]) -> str:
    vllm = next((f"vllm {v}" for name, v in file.where["versions"].items() if name.startswith("vllm") and v), "")
    lines = [
        f"{time.strftime('%Y-%m-%d')}: {summary(list(file.found.values()))}. {describe_machine()}, {vllm}, commit "
        f"{commit() or os.environ.get('COMMIT', 'unknown')}; `python -m benchmarks.faults`."
    ]
    for part, rows in tables.items():
        columns, _ = _columns_and_rows(part, rows)
        cells = [[row.get(name, "") for name in columns] for row in rows]
        lines += [f"### {TITLES[part]}", markdown_table(columns, cells)]
    return "\n\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
