"""One token at a time: the context tower alone (AR), and the denoiser tower run as a plain tower (mock-AR)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from twotower_spec.generation.batch import Batch
from twotower_spec.generation.options import GenerationOptions
from twotower_spec.generation.result import CommittedBlock
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state.transfer import to_device


def stream_ar(batch: Batch, options: GenerationOptions) -> Iterator[CommittedBlock]:
    """Yields every token of the context tower as it is committed.

    Source: modeling_nemotron_twotower.py, generate_ar.
    """
    sampler, logits = options.sampler, batch.prefill()
    while batch.active and logits is not None:
        picked = _pick(batch, sampler, logits)
        yield from [batch.commit(row, [token], 0) for row, token in picked.items()]
        logits = batch.extend({row: [picked[row]] for row in batch.active}, want_logits=True)


def stream_mock_ar(batch: Batch, options: GenerationOptions) -> Iterator[CommittedBlock]:
    """Yields every token of the denoiser tower, which reads the last token again on the context before it.

    Source: modeling_nemotron_twotower.py, generate_mock_ar.
    """
    denoiser, sampler = batch.towers.denoiser, options.sampler
    # The context state stays one token behind: it is the state before the token that the denoiser reads again.
    batch.prefill_without_logits(leave_out_last=True)
    last = {row: prompt[-1] for row, prompt in enumerate(batch.prompts)}
    while batch.active:
        with batch.times.measure("denoise", denoiser.device):
            block = to_device([[last[row]] for row in batch.active], denoiser.device)
            with torch.inference_mode():
                logits = denoiser.step(block, batch.block_context(1), t=None)[:, 0]
            picked = _pick(batch, sampler, logits)
        yield from [batch.commit(row, [token], 1) for row, token in picked.items()]
        batch.extend({row: [last[row]] for row in batch.active}, want_logits=False)
        last = picked


@torch.inference_mode()
def _pick(batch: Batch, sampler: Sampler, logits: Tensor) -> dict[int, int]:
    """The next token of every active row."""
    device = logits.device
    picked = sampler.sample(logits, batch.active_seeds(device), batch.next_positions(device))
    return dict(zip(batch.active, picked.tolist(), strict=True))
