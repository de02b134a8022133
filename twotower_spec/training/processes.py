"""Processes that share the cores of the machine."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
from transformers.utils.logging import disable_progress_bar

# Imported once, by the process that the others are forked from, before it has threads or a CUDA context.
IMPORTED_FIRST = [
    "twotower_spec.training.evaluation",
    "transformers.models.qwen3.modeling_qwen3",
    "matplotlib.figure",
]


def sharing_cores(num_processes: int) -> ProcessPoolExecutor:
    """Opens a pool of processes without a past, each with its share of the threads that this one has.

    On two cores two processes of one thread do 15 to 25 % more than one process of two threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_FIRST)
    return ProcessPoolExecutor(
        max_workers=num_processes,
        mp_context=context,
        initializer=_start,
        initargs=(max(1, torch.get_num_threads() // num_processes),),
    )


def _start(threads: int) -> None:
    """Keeps the progress bars of transformers off the parent's terminal."""
    torch.set_num_threads(threads)
    disable_progress_bar()
