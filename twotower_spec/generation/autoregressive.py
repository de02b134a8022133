"""One token at a time: the context tower alone (AR), and the denoiser tower run as a plain tower (mock-AR)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from twotower_spec.generation.batch import Batch, Prompts, Seeds, TokenIds
from twotower_spec.generation.result import CommittedBlock, GenerationResult
from twotower_spec.generation.sampling import Sampler
from twotower_spec.towers.model import TwoTowers


def generate_ar(
    towers: TwoTowers,
    input_ids: Prompts,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: TokenIds = None,
    *,
    seed: Seeds = None,
) -> GenerationResult:
    """Autoregressive generation with the context tower alone.

    Args:
        towers: the model; the denoiser is not used.
        input_ids: prompts, int64 [num_reqs, num_tokens], or one list of ids per prompt (of any lengths).
        max_new_tokens: most new tokens per row.
        temperature: 0 for greedy.
        top_k: sample among the k most probable tokens; None or 0 for all.
        top_p: sample among the most probable tokens up to this probability; None or 1 for all.
        eos_token_id: an id or several ids that end a row; None to run to `max_new_tokens`.
        seed: of the sampling noise; row i of a call uses `seed + i`, or give one per row. None for a random one.

    Returns:
        New tokens per row (an end token included), times.

    Raises:
        ArgumentError: an argument is not allowed.

    Source: modeling_nemotron_twotower.py, generate_ar.
    """
    batch = ar_batch(towers, input_ids, max_new_tokens, eos_token_id, seed)
    return batch.collect(_ar(batch, Sampler(temperature, top_k, top_p)))


def stream_ar(
    towers: TwoTowers,
    input_ids: Prompts,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: TokenIds = None,
    *,
    seed: Seeds = None,
) -> Iterator[CommittedBlock]:
    """`generate_ar` as an iterator: every token as it is committed."""
    batch = ar_batch(towers, input_ids, max_new_tokens, eos_token_id, seed)
    return _ar(batch, Sampler(temperature, top_k, top_p))


def generate_mock_ar(
    towers: TwoTowers,
    input_ids: Prompts,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: TokenIds = None,
    *,
    seed: Seeds = None,
) -> GenerationResult:
    """Token by token with the denoiser tower, which reads the last token again on the context before it.

    Arguments, result and errors are those of `generate_ar`.

    Source: modeling_nemotron_twotower.py, generate_mock_ar.
    """
    batch = ar_batch(towers, input_ids, max_new_tokens, eos_token_id, seed)
    return batch.collect(_mock_ar(batch, Sampler(temperature, top_k, top_p)))


def stream_mock_ar(
    towers: TwoTowers,
    input_ids: Prompts,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: TokenIds = None,
    *,
    seed: Seeds = None,
) -> Iterator[CommittedBlock]:
    """`generate_mock_ar` as an iterator: every token as it is committed."""
    batch = ar_batch(towers, input_ids, max_new_tokens, eos_token_id, seed)
    return _mock_ar(batch, Sampler(temperature, top_k, top_p))


def ar_batch(towers: TwoTowers, input_ids: Prompts, max_new_tokens: int, eos_token_id: TokenIds, seed: Seeds) -> Batch:
    """Rows that gain tokens of the context tower's; the last one of a row is never read."""
    return Batch(towers, input_ids, max_new_tokens, eos_token_id, seed, state_tokens=max(max_new_tokens - 1, 0))


@torch.inference_mode()
def _pick(batch: Batch, sampler: Sampler, logits: Tensor) -> list[int]:
    """The next token of every active row."""
    device = logits.device
    picked = sampler.sample(logits, batch.active_seeds(device), batch.next_positions(device))
    tokens: list[int] = picked.tolist()
    return tokens


def _ar(batch: Batch, sampler: Sampler) -> Iterator[CommittedBlock]:
    logits = batch.prefill()
    while batch.active and logits is not None:
        picked = dict(zip(batch.active, _pick(batch, sampler, logits), strict=True))
        yield from [batch.commit(row, [token], 0) for row, token in picked.items()]
        logits = batch.extend({row: [picked[row]] for row in batch.active}, want_logits=True)


def _mock_ar(batch: Batch, sampler: Sampler) -> Iterator[CommittedBlock]:
    denoiser = batch.towers.denoiser
    # The context state stays one token behind: it is the state before the token that the denoiser reads again.
    batch.prefill_without_logits(leave_out_last=True)
    last = {row: prompt[-1] for row, prompt in enumerate(batch.prompts)}
    while batch.active:
        with batch.times.measure("denoise", denoiser.device):
            block = torch.tensor([[last[row]] for row in batch.active], device=denoiser.device)
            with torch.inference_mode():
                logits = denoiser.step(block, batch.block_context(1), t=None)[:, 0]
            picked = dict(zip(batch.active, _pick(batch, sampler, logits), strict=True))
        yield from [batch.commit(row, [token], 1) for row, token in picked.items()]
        batch.extend({row: [last[row]] for row in batch.active}, want_logits=False)
        last = picked
