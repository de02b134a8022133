"""`vllm bench serve` that stays: importing vLLM takes longer than a small load, so one process drives them all."""

from __future__ import annotations

import argparse
import sys
from multiprocessing.connection import Connection

from twotower_bench.connected_process import own_end
from twotower_bench.vllm_hooks import LOAD_GENERATOR_HOOKS
from twotower_spec.errors import TwoTowerError
from vllm_twotower import compat


def serve_loads(connection: Connection) -> None:
    """Runs command lines of `vllm bench serve` until the other end closes, and gives back the results.

    An error ends the process; the log has it.

    Raises:
        TwoTowerError: the load generator is not as we know it.
    """
    if missing := compat.missing_hooks(LOAD_GENERATOR_HOOKS):
        raise TwoTowerError(compat.warning_text(missing))
    from vllm.benchmarks.serve import add_cli_args, main

    parser = argparse.ArgumentParser("vllm bench serve")
    add_cli_args(parser)
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        connection.send(main(parser.parse_args(arguments)))


if __name__ == "__main__":
    serve_loads(own_end(int(sys.argv[1])))
