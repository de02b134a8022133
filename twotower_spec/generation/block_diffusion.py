"""Mask diffusion: the loop over blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from twotower_spec.config import DiffusionConfig, check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.batch import Batch, Prompts, Seeds, TokenIds
from twotower_spec.generation.denoising import (
    DenoisingRequest,
    HostLoop,
    PublishedSchedule,
    StepCallback,
    StepCallbackObserver,
    StepObserver,
    TokenPicker,
    TraceRecorder,
)
from twotower_spec.generation.result import CommittedBlock, GenerationResult
from twotower_spec.generation.sampling import Sampler
from twotower_spec.towers import DenoiserTower
from twotower_spec.towers.model import TwoTowers


def generate_mask_diffusion(
    towers: TwoTowers,
    input_ids: Prompts,
    max_new_tokens: int = 128,
    block_size: int = 16,
    steps_per_block: int = 16,
    mask_token_id: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    confidence_threshold: float = 0.9,
    eos_token_id: TokenIds = None,
    step_callback: StepCallback | None = None,
    *,
    top_p: float | None = None,
    seed: Seeds = None,
    return_traces: bool = False,
) -> GenerationResult:
    """Block diffusion: blocks are denoised in parallel over a few steps, then read by the context tower.

    Args:
        towers: the model, with its denoiser.
        input_ids: prompts, int64 [num_reqs, num_tokens], or one list of ids per prompt (of any lengths).
        max_new_tokens: most new tokens per row; the last block is cut where it is no multiple of `block_size`.
        block_size: tokens per block.
        steps_per_block: most denoising steps per block.
        mask_token_id: None for the one of the configuration (3).
        temperature: 0 for greedy; above, picks are sampled, confidences stay those of temperature 1.
        top_k: sample among the k most probable tokens; None or 0 for all.
        confidence_threshold: picks more probable than this are committed; the model card recommends 0.8.
        eos_token_id: an id or several ids; a row ends after the block that contains one. The block is kept whole.
        step_callback: see `StepCallback`.
        top_p: sample among the most probable tokens up to this probability; None or 1 for all.
        seed: of the sampling noise; row i of a call uses `seed + i`, or give one per row. None for a random one.
        return_traces: record every step.

    Returns:
        New tokens and denoiser passes per row, times, traces.

    Raises:
        ArgumentError: an argument is not allowed, or the denoiser is not loaded.

    Source: modeling_nemotron_twotower.py, generate_mask_diffusion.
    """
    config = DiffusionConfig(
        block_size=block_size,
        steps_per_block=steps_per_block,
        confidence_threshold=confidence_threshold,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        mask_token_id=towers.config.mask_token_id if mask_token_id is None else mask_token_id,
    )
    batch = _diffusion_batch(towers, input_ids, max_new_tokens, config, eos_token_id, seed)
    return batch.collect(_mask_diffusion(batch, config, return_traces, step_callback), return_traces)


def stream_mask_diffusion(
    towers: TwoTowers,
    input_ids: Prompts,
    max_new_tokens: int = 128,
    config: DiffusionConfig | None = None,
    eos_token_id: TokenIds = None,
    *,
    seed: Seeds = None,
    with_traces: bool = False,
) -> Iterator[CommittedBlock]:
    """`generate_mask_diffusion` as an iterator: every block as it is committed.

    Args:
        towers: the model, with its denoiser.
        input_ids: prompts.
        max_new_tokens: most new tokens per row.
        config: how a block is denoised; None for the defaults.
        eos_token_id: ids that end a row.
        seed: of the sampling noise.
        with_traces: attach the steps to every block.
    """
    config = config or DiffusionConfig(mask_token_id=towers.config.mask_token_id)
    batch = _diffusion_batch(towers, input_ids, max_new_tokens, config, eos_token_id, seed)
    return _mask_diffusion(batch, config, with_traces, None)


def check_mask_token(towers: TwoTowers, config: DiffusionConfig) -> None:
    """Refuses a mask token outside the vocabulary.

    Raises:
        ArgumentError: with the id.
    """
    if config.mask_token_id >= towers.config.vocab_size:
        raise ArgumentError(
            f"mask_token_id {config.mask_token_id} is outside the vocabulary; allowed are 0 to "
            f"{towers.config.vocab_size - 1}"
        )


def _diffusion_batch(
    towers: TwoTowers,
    input_ids: Prompts,
    max_new_tokens: int,
    config: DiffusionConfig,
    eos_token_id: TokenIds,
    seed: Seeds,
) -> Batch:
    check_mask_token(towers, config)
    towers.require_denoiser()
    check_integer("max_new_tokens", max_new_tokens, minimum=0)
    state_tokens = max(max_new_tokens - 1, 0) // config.block_size * config.block_size
    return Batch(towers, input_ids, max_new_tokens, eos_token_id, seed, state_tokens)


def _mask_diffusion(
    batch: Batch, config: DiffusionConfig, with_traces: bool, step_callback: StepCallback | None
) -> Iterator[CommittedBlock]:
    denoiser = batch.towers.denoiser
    batch.prefill_without_logits()
    with batch.times.measure("denoise", denoiser.device):
        loop = host_loop(denoiser, config)
    schedule = PublishedSchedule(config.confidence_threshold, config.steps_per_block)
    block_idx = 0
    while batch.active:
        recorder = TraceRecorder() if with_traces else None
        observers: list[StepObserver] = [recorder] if recorder else []
        if step_callback is not None:
            observers.append(StepCallbackObserver(step_callback, config.steps_per_block, block_idx))
        with batch.times.measure("denoise", denoiser.device):
            request = DenoisingRequest(
                batch.block_context(config.block_size),
                batch.active_seeds(denoiser.device),
                batch.next_positions(denoiser.device),
                schedule,
            )
            done = loop.denoise(request, observers)
            blocks, num_passes = done.token_ids.tolist(), done.num_passes.tolist()
        committed = []
        for i, row in enumerate(list(batch.active)):
            block = batch.commit(row, blocks[i], num_passes[i])
            committed.append(replace(block, trace=recorder.traces[i]) if recorder else block)
        whole = {block.row: blocks[i] for i, block in enumerate(committed)}
        yield from committed
        batch.extend({row: whole[row] for row in batch.active}, want_logits=False)
        block_idx += 1


def host_loop(denoiser: DenoiserTower, config: DiffusionConfig) -> HostLoop:
    """The denoising loop for a configuration."""
    sampler = Sampler(config.temperature, config.top_k, config.top_p)
    return HostLoop(denoiser, config.block_size, TokenPicker(sampler, config.mask_token_id))
