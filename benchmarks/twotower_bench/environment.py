"""Environment variables that vLLM needs."""

from __future__ import annotations

import os
from typing import Literal

import torch

Runner = Literal["V1", "V2"]

EVERYWHERE = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
ON_A_CPU = {
    # One thread is about ten times as fast as the default. One engine works at a time, on whichever core is free.
    "OMP_NUM_THREADS": "1",
    # The n-gram lookup's Numba would give torch the threads that it finds, too.
    "NUMBA_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def engine_environment() -> dict[str, str]:
    """Variables to start a process with, beside its own; what the user has set stays."""
    wanted = EVERYWHERE if torch.cuda.is_available() else {**EVERYWHERE, **ON_A_CPU}
    # The engine and its scheduler are in the process that we talk to.
    return {name: os.environ.get(name, value) for name, value in wanted.items()} | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0"
    }


def on_runner(runner: Runner) -> dict[str, str]:
    """Variables that have a process run this model runner of vLLM."""
    return {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2"))}
