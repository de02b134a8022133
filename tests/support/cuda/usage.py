"""Counts of what devices were asked to do."""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]
OURS = ("twotower_spec", "kernels", "vllm_plugin")


@dataclass
class Usage:
    """Counts since the last `reset`.

    Attributes:
        launches: operators that start a kernel, by name.
        kernels: launches of Triton kernels, by name.
        views: operators that start none.
        num_allocations: tensors that were made on a device.
        waits: why the host waited for a device, by line of this project, as "file:number why".
        crossings: bytes that went from one device to another, by line.
        specialisations: kernels as Triton would compile them, since the beginning.
        held, peak: bytes on each device, by its index; now, and at most.
    """

    launches: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    num_allocations: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    crossings: Counter[str] = field(default_factory=Counter)
    specialisations: set[tuple[Any, ...]] = field(default_factory=set)
    held: Counter[int] = field(default_factory=Counter)
    peak: Counter[int] = field(default_factory=Counter)

    @property
    def num_launches(self) -> int:
        """Launches of operators and Triton kernels."""
        return self.launches.total() + self.kernels.total()

    def waits_by_source(self) -> dict[str, int]:
        """Waits by "file: source, why"; lines stay themselves while others come and go above them."""
        found: Counter[str] = Counter()
        for place, count in self.waits.items():
            file, _, rest = place.partition(":")
            number, _, why = rest.partition(" ")
            source = linecache.getline(str(REPOSITORY / file), int(number)).strip()
            found[f"{file}: {source}, {why}"] += count
        return dict(found)

    def reset(self) -> None:
        """Begins to count anew; what is held stays held."""
        for counts in (self.launches, self.kernels, self.views, self.waits, self.crossings):
            counts.clear()
        self.num_allocations, self.peak = 0, Counter(self.held)

    def allocated(self, device: int, num_bytes: int) -> None:
        """Counts a tensor that was made."""
        self.num_allocations += 1
        self.held[device] += num_bytes
        self.peak[device] = max(self.peak[device], self.held[device])

    def freed(self, device: int, num_bytes: int) -> None:
        """Counts one that is gone."""
        self.held[device] -= num_bytes


def our_line() -> str:
    """The innermost line of this project's packages that runs, `file:line`, or nothing."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(REPOSITORY) and path.relative_to(REPOSITORY).parts[0] in OURS:
            return f"{path.relative_to(REPOSITORY)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
