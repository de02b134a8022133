"""Mask diffusion: blocks are denoised in parallel over a few steps, then read by the context tower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from twotower_spec.generation.batch import Batch
from twotower_spec.generation.denoising import (
    DenoisedBlocks,
    DenoisingRequest,
    HostLoop,
    StepCallbackObserver,
    StepObserver,
    TraceRecorder,
)
from twotower_spec.generation.options import GenerationOptions
from twotower_spec.generation.result import CommittedBlock


def stream_mask_diffusion(batch: Batch, options: GenerationOptions) -> Iterator[CommittedBlock]:
    """Yields every block as it is committed.

    Source: modeling_nemotron_twotower.py, generate_mask_diffusion.
    """
    batch.prefill_without_logits()
    loop = batch.denoising_loop(options)
    block_idx = 0
    while batch.active:
        recorder = TraceRecorder() if options.return_traces else None
        done = _denoise(batch, loop, options, _observers(recorder, options, block_idx))
        blocks, num_passes = done.token_ids.tolist(), done.num_passes.tolist()
        rows = list(batch.active)
        committed = [batch.commit(row, blocks[i], num_passes[i]) for i, row in enumerate(rows)]
        if recorder is not None:
            committed = [replace(block, trace=recorder.traces[i]) for i, block in enumerate(committed)]
        yield from committed
        whole = dict(zip(rows, blocks, strict=True))
        batch.extend({row: whole[row] for row in batch.active}, want_logits=False)
        block_idx += 1


def _denoise(batch: Batch, loop: HostLoop, options: GenerationOptions, observers: list[StepObserver]) -> DenoisedBlocks:
    """The next block of every active row."""
    device = batch.towers.denoiser.device
    with batch.times.measure("denoise", device):
        request = DenoisingRequest(
            context=batch.block_context(loop.block_size),
            seeds=batch.active_seeds(device),
            first_positions=batch.next_positions(device),
            commit_rule=options.schedule,
        )
        return loop.denoise(request, observers)


def _observers(recorder: TraceRecorder | None, options: GenerationOptions, block_idx: int) -> list[StepObserver]:
    """Observers of one block, as the options ask for them."""
    observers: list[StepObserver] = [] if recorder is None else [recorder]
    if options.step_callback is not None:
        assert options.steps_per_block is not None
        observers.append(StepCallbackObserver(options.step_callback, options.steps_per_block, block_idx))
    return observers
