"""From files of measurements to the measurements, those of one run together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower_bench.records import LoadPoint, ServingCell, read_row
from twotower_bench.report.document import Origin
from twotower_bench.serving_profile import ServingProfile
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.lm_eval_model import TaskScore
from twotower_spec.evaluation.settings import Setting
from twotower_spec.evaluation.standalone import Cell


@dataclass(frozen=True)
class Score:
    """A setting of the model alone on a task of lm-eval."""

    setting: Setting
    score: TaskScore


# By the field `kind` of a row.
KINDS: Mapping[str, type[Any]] = {"serving_cell": ServingCell, "load_point": LoadPoint, "cell": Cell, "score": Score}


@dataclass
class Measurements:
    """Of one run in one file; most lists are empty.

    Attributes:
        source: name of the file.
        origins: all that its rows have, in order.
        serving_cells: of `bench acceptance` or `bench sweep`.
        load_points: of `bench serve`.
        cells, scores: of `bench standalone`.
        profile: of `plan`.
    """

    source: str
    origins: list[Origin] = field(default_factory=list)
    serving_cells: list[ServingCell] = field(default_factory=list)
    load_points: list[LoadPoint] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    profile: ServingProfile | None = None

    def add(self, measured: Any, origin: Origin) -> None:
        """Keeps what a row holds."""
        lists: Mapping[type, list[Any]] = {
            ServingCell: self.serving_cells, LoadPoint: self.load_points, Cell: self.cells, Score: self.scores
        }  # fmt: skip
        lists[type(measured)].append(measured)
        if origin not in self.origins:
            self.origins.append(origin)


def read_measurements(files: Sequence[Path]) -> list[Measurements]:
    """What files hold, run by run; a file that is named twice is read once.

    Args:
        files: JSON lines of the benchmarks, or serving profiles.

    Raises:
        ArgumentError: there are no files, or one cannot be read, or has nothing to report.
    """
    if not files:
        raise ArgumentError("no files are given to report on; name at least one that a benchmark wrote with --json")
    distinct = dict.fromkeys(path.resolve() for path in files)
    return [measurements for path in distinct for measurements in _read(path)]


def _read(path: Path) -> list[Measurements]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ArgumentError(f"{path} cannot be read ({reason}); give a file that a benchmark wrote with --json") from (
            error
        )
    if _is_profile(text):
        profile = ServingProfile.load(path)
        return [Measurements(path.name, [_origin_of_profile(profile)], profile=profile)]
    runs: dict[str, Measurements] = {}
    for number, line in _whole_lines(text):
        try:
            row = json.loads(line)
            kind = KINDS.get(row["kind"])
            if kind is None:
                continue
            measured = read_row(kind, row, f"{path}:{number}")
            runs.setdefault(row["run"], Measurements(path.name)).add(measured, _origin_of_row(row))
        except ArgumentError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                f"{path}:{number} is not a row that a benchmark wrote ({type(error).__name__}: {error}); give a file "
                f"that was written with --json, as it was written"
            ) from error
    if not runs:
        raise ArgumentError(f"{path} has no measurements; give a file with rows of kind {', '.join(KINDS)}")
    return list(runs.values())


def _whole_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers; a last one without an end is still being written."""
    whole = text[: text.rfind("\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        if line.strip():
            yield number, line


def _is_profile(text: str) -> bool:
    try:
        raw = json.loads(text)
    except ValueError:
        return False
    return isinstance(raw, dict) and "source" in raw and "kind" not in raw


def _origin_of_row(row: Mapping[str, Any]) -> Origin:
    return _origin(row["machine"], row.get("versions") or {}, row["command"])


def _origin_of_profile(profile: ServingProfile) -> Origin:
    return _origin(profile.machine, profile.versions, profile.source)


def _origin(machine: Mapping[str, Any], versions: Mapping[str, Any], command: str) -> Origin:
    """From a row's or profile's own words: this report may be made elsewhere."""
    counts = (f"{machine[name]} {name}" for name in ("cores", "threads") if machine.get(name))
    hardware = ", ".join([machine.get("processor") or "unknown processor", *counts, machine.get("gpu") or "no GPU"])
    named = {**{name: machine.get(name) for name in ("python", "torch", "transformers")}, **versions}
    text = ", ".join(f"{name} {value}" for name, value in named.items() if value and name != "commit")
    return Origin(hardware, text, machine.get("commit") or versions.get("commit"), command)
