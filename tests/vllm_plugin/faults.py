"""Cells of the matrix of faults, in engines that are forked from the process of the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.vllm_plugin.fork_server import server_and_variables
from twotower_bench.faults.cells import Cell, Seen
from twotower_bench.faults.matrix import run_cells


def cells_seen(cells: Sequence[Cell], environment: Mapping[str, str] | None = None) -> dict[Cell, Seen]:
    """Runs cells of the matrix in an engine, all of one model runner; a call that hangs does so for a moment."""
    server, variables = server_and_variables(environment)
    return {found.cell: found for found in run_cells(cells, server, variables, hang_s=0.5)}
