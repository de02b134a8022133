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


_in_use: dict[tuple[str, str], Settings] = {}


def settings(op: str, kernel: str) -> Settings:
    """Settings for a launch of `kernel` of the op in folder `op`."""
    found = _in_use.get((op, kernel))
    if found is None:
        found = _in_use[op, kernel] = read_table(op)["kernels"][kernel]
    return found


@contextmanager
def trying(op: str, kernel: str, candidate: Settings) -> Iterator[None]:
    """Lets launches take the candidate's settings inside the context: for the tuner and for tests."""
    _in_use[op, kernel] = candidate
    try:
        yield
    finally:
        del _in_use[op, kernel]


def table_path(op: str) -> Path:
    """Path of an op's table."""
    return Path(__file__).parent / op / TABLE


@cache
def read_table(op: str) -> Table:
    """Reads the table of an op, once."""
    table: Table = json.loads(table_path(op).read_text())
    return table


# As Triton's own, which are part of its language and take 2 to 3 us a call.
def cdiv(size: int, part: int) -> int:
    """Number of parts that hold `size`, the last one perhaps not full."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """Smallest power of 2 that is at least `size`."""
    return 1 << (size - 1).bit_length()
