"""Cells that are measured, or were in a run before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twotower_bench.cli.measurements import progress_bar
from twotower_bench.cli.record import Record
from twotower_bench.records import ServingCell, System
from twotower_bench.serving_run import Place, ServingRun
from twotower_spec.cli.interrupts import Interrupts

KIND = "serving_cell"


def serving_record(content: Any, systems: Sequence[System]) -> Record[ServingCell]:
    """Cells by system, load and repeat; arguments as `Record`."""
    return Record(KIND, ServingCell, lambda cell: (cell.system.name, cell.load, cell.repeat), content, systems)


def complete(record: Record[ServingCell], run: ServingRun, places: Sequence[Place]) -> list[ServingCell]:
    """Measures the cells that are missing; all of them, in the order asked for."""
    missing = [place for place in places if place.key not in record.found]
    with progress_bar() as bar, Interrupts() as interrupts:
        task = bar.add_task("loading", total=len(places), completed=len(places) - len(missing))
        cells = run.measure(missing)
        for place in missing:
            bar.update(task, description=f"{place.candidate.system.title}, {place.load}")
            record.keep(next(cells))
            bar.advance(task)
            interrupts.check()
    return [record.found[place.key] for place in places]
