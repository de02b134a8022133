"""Settings of every launch (block sizes, warps, stages), from the table in the op's folder.

Nothing is tuned while serving; `python -m benchmarks.tune` writes the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypedDict

Settings = dict[str, int]

TABLE = "tuned.json"


class Table(TypedDict):
    """Contents of a table.

    Attributes:
        chosen_by: how its settings were chosen, and on which hardware.
        kernels: settings of every kernel of the op, by name: `constexpr` arguments, `num_warps`, `num_stages`.
    """

    chosen_by: str
    kernels: dict[str, Settings]


_tried: dict[tuple[str, str], Settings] = {}


def settings(op: str, kernel: str) -> Settings:
    """Settings for a launch of `kernel` of the op in folder `op`."""
    return _tried.get((op, kernel)) or read_table(op)["kernels"][kernel]


@contextmanager
def trying(op: str, kernel: str, candidate: Settings) -> Iterator[None]:
    """Lets launches take the candidate's settings inside the context: for the tuner and for tests."""
    _tried[op, kernel] = candidate
    try:
        yield
    finally:
        del _tried[op, kernel]


def table_path(op: str) -> Path:
    """Path of an op's table."""
    return Path(__file__).parent / op / TABLE


@cache
def read_table(op: str) -> Table:
    """Reads the table of an op, once."""
    table: Table = json.loads(table_path(op).read_text())
    return table


def next_power_of_2(size: int) -> int:
    """Smallest power of 2 that is at least `size`; Triton's own takes 3 us a call, as part of a kernel's language."""
    return 1 << (size - 1).bit_length()
