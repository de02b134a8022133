"""`vllm serve` in a process that was forked from one that has imported vLLM."""

from __future__ import annotations

import atexit
import multiprocessing
import sys
from typing import Any


def run_vllm(*words: str) -> None:
    """Does what the command `vllm` does with these words; its engine is forked as well."""
    fork_workers()
    sys.argv = ["vllm", *words]
    from vllm.entrypoints.cli.main import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # a fork leaves without them, and what they remove would stay


def fork_workers() -> None:
    """Lets vLLM fork engines and workers where it would spawn them, in this process.

    On a CPU alone it spawns them, and each then imports vLLM anew.
    """
    get_context = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return get_context("fork" if method == "spawn" else method)

    multiprocessing.get_context = forking
