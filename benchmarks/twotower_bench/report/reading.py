"""Files of measurements as what was measured, that of one run together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from twotower_bench.records import LoadPoint, ServingCell, read_row
from twotower_bench.report.document import Origin
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.standalone import Cell, Score
from twotower_spec.reading import read_text
from twotower_spec.recorded_command import recorded_text

REMEDY = "give a file that a benchmark wrote with --json, as it was written"


# By the field `kind` of a row; a list of `Measurements` is called as that with an s.
KINDS: Mapping[str, type[Any]] = {"serving_cell": ServingCell, "load_point": LoadPoint, "cell": Cell, "score": Score}


@dataclass(frozen=True)
class Where:
    """Where a row was measured: its run, and the machine, versions and command in its own words."""

    run: str
    machine: Mapping[str, str | int | float | None]
    command: str
    versions: Mapping[str, str | None] | None = None

    @property
    def origin(self) -> Origin:
        """The same as readers see it."""
        machine, versions = self.machine, self.versions or {}
        counts = (f"{machine[name]} {name}" for name in ("cores", "threads") if machine.get(name))
        hardware = (machine.get("processor") or "unknown processor", *counts, machine.get("gpu") or "no GPU")
        named = {**{name: machine.get(name) for name in ("python", "torch", "transformers")}, **versions}
        texts = (f"{name} {value}" for name, value in named.items() if value and name != "commit")
        commit = machine.get("commit") or versions.get("commit")
        return Origin(
            ", ".join(map(str, hardware)),
            ", ".join(texts),
            str(commit) if commit else None,
            recorded_text(self.command),
        )


@dataclass
class Measurements:
    """Measurements of one run in one file; most lists are empty.

    Attributes:
        source: name of the file.
        origins: all that its rows have, in order.
        serving_cells: of `bench acceptance` or `bench sweep`.
        load_points: of `bench serve`.
        cells, scores: of `bench standalone`.
    """

    source: str
    origins: list[Origin] = field(default_factory=list)
    serving_cells: list[ServingCell] = field(default_factory=list)
    load_points: list[LoadPoint] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


def read_measurements(files: Sequence[Path]) -> list[Measurements]:
    """Reads files, run by run; a file that is named twice is read once.

    Args:
        files: JSON lines of the benchmarks.

    Raises:
        ArgumentError: there are no files, or one cannot be read, or has nothing to report.
    """
    if not files:
        raise ArgumentError("no files are given to report on; name at least one that a benchmark wrote with --json")
    distinct = dict.fromkeys(path.resolve() for path in files)
    return [measurements for path in distinct for measurements in _read(path)]


def _read(path: Path) -> list[Measurements]:
    text = read_text(path, remedy=REMEDY)
    runs: dict[str, Measurements] = {}
    # A last line without an end is still being written, and left out.
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n"), start=1):
        place, row = f"{path}:{number}", _parsed(line, f"{path}:{number}")
        if kind := KINDS.get(name := str(row.get("kind"))):
            measured, where = read_row(kind, row, place), read_row(Where, row, place)
            run = runs.setdefault(where.run, Measurements(path.name))
            getattr(run, f"{name}s").append(measured)
            if where.origin not in run.origins:
                run.origins.append(where.origin)
    if not runs:
        raise ArgumentError(f"{path} has no measurements; give a file with rows of kind {', '.join(KINDS)}")
    return list(runs.values())


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        row = from_json(line, allow_inf_nan=False) if line.strip() else {}
    except ValueError as error:
        raise ArgumentError(f"{place} is not a row that a benchmark wrote ({error}); {REMEDY}") from error
    return read_row(dict[str, Any], row, place)
