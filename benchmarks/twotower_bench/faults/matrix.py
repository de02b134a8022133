"""The matrix of one model runner: an engine without drafts that says what texts must be, and one under every fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from twotower_bench.faults.cells import Cell, Seen
from twotower_bench.faults.engine import CellsOrder
from twotower_bench.fork_server import ForkServer
from twotower_spec.demo.trio import trio_path

FUNCTION = "twotower_bench.faults.engine:serve_cells"
NUM_DRAFTS = 8
# Far more room than the requests need, and far less than vLLM would take.
ROOMY: Mapping[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 10,
    "max_num_batched_tokens": 512,
    "num_gpu_blocks_override": 400,
}
# The fixed policy drafts whatever the clock says.
DRAFTER: Mapping[str, Any] = {
    "model": str(trio_path("twotower")),
    "num_speculative_tokens": NUM_DRAFTS,
    "twotower": {"log_interval_s": 0, "policy": "fixed", "block_size": NUM_DRAFTS},
}
LONGEST_SILENCE_S = 400.0


def engine_arguments(speculative_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of `LLM()` on the bundled verifier."""
    return {
        "model": str(trio_path("verifier")),
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "disable_log_stats": False,
        **ROOMY,
        "speculative_config": None if speculative_config is None else dict(speculative_config),
    }


def run_cells(
    cells: Sequence[Cell], fork_server: ForkServer, environment: Mapping[str, str], **changes: Any
) -> Iterator[Seen]:
    """Runs cells in one engine; what is seen in each comes as soon as it is known.

    Where a fault ends the engine, its requests are lost, and another engine goes on with the cells after it.

    Args:
        cells: all of one model runner, which the environment chooses.
        fork_server: that engines are forked from.
        environment: all variables of the engines.
        changes: of `CellsOrder`.
    """
    plain = CellsOrder(engine_arguments(None), **changes)
    (expected,) = _answers(plain, 1, fork_server, environment)
    left = tuple(cells)
    while left:
        order = replace(plain, arguments=engine_arguments(DRAFTER), cells=left, expected=expected)
        texts = None
        try:
            for answer in _answers(order, 1 + len(left), fork_server, environment):
                if texts is None:
                    texts = answer
                    continue
                yield answer
                left = left[1:]
        except _EngineEnded as ended:
            if texts is None:
                raise
            yield Seen(left[0], 1, plain.num_requests, sentences=(str(ended),))
            left = left[1:]


class _EngineEnded(Exception):
    """An engine that has ended before it has answered; the last it said is in the message."""


def _answers(
    order: CellsOrder, num_answers: int, fork_server: ForkServer, environment: Mapping[str, str]
) -> Iterator[Any]:
    """Answers of an engine, which is ended when there are so many."""
    with TemporaryDirectory(prefix="faults-") as folder:
        process = fork_server.fork(
            "the engine under faults", FUNCTION, (order,), Path(folder), environment, is_connected=True
        )
        assert process.connection is not None
        with closing(process.connection) as connection:
            try:
                for _ in range(num_answers):
                    if not connection.poll(LONGEST_SILENCE_S):
                        raise _EngineEnded(str(process.failure(f"did not answer for {LONGEST_SILENCE_S:.0f} s")))
                    yield connection.recv()
            except (EOFError, ConnectionError) as error:
                raise _EngineEnded(str(process.failure("has ended"))) from error
            finally:
                process.kill()
