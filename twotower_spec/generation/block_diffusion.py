"""Mask diffusion: the loop over blocks, and the loop over denoising steps inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from twotower_spec.config import DiffusionConfig, accumulation_dtype, check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.batch import Batch, Prompts, Seeds, TokenIds
from twotower_spec.generation.result import BlockTrace, CommittedBlock, GenerationResult
from twotower_spec.generation.sampling import Sampler
from twotower_spec.generation.unmasking import CommitRule, DenoisingStep, PublishedSchedule, pick_noise, unmask_by
from twotower_spec.state import BlockContext
from twotower_spec.towers import DenoiserTower
from twotower_spec.towers.model import TwoTowers


class StepCallback(Protocol):
    """Called with the fresh block (`logits` None), then after every step with the block that the step read."""

    def __call__(
        self, step_idx: int, steps_per_block: int, xt: Tensor, *, t: float, logits: Tensor | None, block_idx: int
    ) -> None:
        """Looks at one step.

        Args:
            step_idx: counts from 0 within the block.
            steps_per_block: the limit.
            xt: int64 [num_active, block_size].
            t: masked fraction, the mean over the rows.
            logits: [num_active, block_size, vocab], the mask token not excluded.
            block_idx: counts from 0.
        """
        ...


@dataclass(frozen=True)
class DenoisedBlocks:
    """Result of denoising one block per row.

    Attributes:
        token_ids: int64 [num_reqs, block_size].
        num_passes: denoiser passes each row took part in.
        confidence: float [num_reqs, block_size], of each token in the step that committed it; that of the call for
            first tokens that were given.
        probs: float [num_reqs, block_size, vocab], distributions that the first step's picks were drawn from, if asked
            for; undefined at a first token that was given.
        traces: per row, if asked for.
    """

    token_ids: Tensor
    num_passes: list[int]
    confidence: Tensor
    probs: Tensor | None
    traces: list[BlockTrace] | None


class BlockDenoiser:
    """Fills masked blocks, by the published schedule or another rule; rows have their own time and leave when done."""

    def __init__(
        self,
        denoiser: DenoiserTower,
        config: DiffusionConfig,
        num_token_ids: int | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        """Computes the time modulation for every number of masked positions once.

        Args:
            denoiser: the tower.
            config: block size, schedule and sampling.
            num_token_ids: ids from this one on are never picked; None allows the whole vocabulary.
            sampler: in place of the configuration's temperature and filters.
        """
        self.denoiser, self.config, self.num_token_ids = denoiser, config, num_token_ids
        self.sampler = sampler or Sampler(config.temperature, config.top_k, config.top_p)
        self.schedule = PublishedSchedule(config.confidence_threshold, config.steps_per_block)
        with torch.inference_mode():
            self.modulation = denoiser.time_conditioning.for_block_size(config.block_size)

    @torch.inference_mode()
    def denoise(
        self,
        context: BlockContext,
        seeds: Tensor,
        first_positions: Tensor,
        with_traces: bool = False,
        step_callback: StepCallback | None = None,
        block_idx: int = 0,
        first_tokens: Tensor | None = None,
        first_confidence: Tensor | None = None,
        rule: CommitRule | None = None,
        with_probs: bool = False,
        same_noise: bool = False,
        num_wanted: int | None = None,
    ) -> DenoisedBlocks:
        """Denoises one block per row.

        Args:
            context: state of the rows, read only.
            seeds: int64 [num_reqs], of the sampling noise.
            first_positions: int64 [num_reqs], index of the block's first token in each sequence.
            with_traces: record every step.
            step_callback: called around every step; then all rows stay in the loop and all logits are computed.
            block_idx: handed to the callback.
            first_tokens: int64 [num_reqs], the first token of every block where it is known already; None masks it.
            first_confidence: float [num_reqs], how probable these are; None for certain.
            rule: what each step commits; None for the published schedule. Without an end of its own it takes
                `block_size` steps at most.
            with_probs: keep the distributions of the first step's picks.
            same_noise: every step samples with the noise of draw 0 instead of its own.
            num_wanted: positions of a block that are filled, from the left; the others stay masked, and the rule does
                not see them as such. For rules that commit everything in the first step: they fill these as they would
                with the others. None for all.
        """
        config = self.config
        num_reqs = len(context.context_lens)
        rule = rule or self.schedule
        block = self.denoiser.initial_block(num_reqs, config.block_size, config.mask_token_id)
        confidence = torch.ones(block.shape, dtype=accumulation_dtype(self.denoiser.dtype), device=block.device)
        probs: Tensor | None = None
        if first_tokens is not None:
            block[:, 0] = first_tokens
            if first_confidence is not None:
                confidence[:, 0] = first_confidence
        num_passes = [0] * num_reqs
        recorder = _Recorder(block.tolist()) if with_traces else None
        active, xt, sure = list(range(num_reqs)), block, confidence
        if step_callback is not None:
            step_callback(0, config.steps_per_block, xt, t=1.0, logits=None, block_idx=block_idx)
        for step in range(config.block_size):
            masked = xt == config.mask_token_id
            num_masked = masked.sum(-1).tolist()
            if num_wanted is not None:
                masked[:, num_wanted:] = False
            num_open = num_masked if num_wanted is None else masked.sum(-1).tolist()
            open_rows = [row for row, count in enumerate(num_open) if count]
            if not open_rows:
                break
            if len(open_rows) < len(active) and step_callback is None:
                context, active = context.select(open_rows), [active[row] for row in open_rows]
                xt, masked, sure = xt[open_rows], masked[open_rows], sure[open_rows]
                seeds, first_positions = seeds[open_rows], first_positions[open_rows]
                num_masked = [num_masked[row] for row in open_rows]
                open_rows = list(range(len(active)))
            for row in open_rows:
                num_passes[active[row]] += 1
            full_logits = None
            positions = masked.flatten().nonzero()[:, 0]
            if step_callback is None:
                logits = self.denoiser(xt, context, self._modulation(num_masked), positions, wide_logits=False)
            else:
                full_logits = self.denoiser(xt, context, self._modulation(num_masked))
                logits = full_logits[positions]
            if self.sampler.filters or (with_probs and step == 0):
                self._exclude(logits)
            if with_probs and step == 0:
                probs = confidence.new_zeros(xt.numel(), logits.shape[-1])
                probs[positions] = self.sampler.probs(logits).to(probs.dtype)
            done = unmask_by(
                rule,
                DenoisingStep(step, active, masked, sure),
                xt,
                logits,
                positions,
                config.mask_token_id,
                self.num_token_ids,
                pick_noise(self.sampler, logits, seeds, first_positions, 0 if same_noise else step),
            )
            before, xt, sure = xt, done.token_ids, done.confidence
            if len(active) == num_reqs:
                block, confidence = xt, sure
            else:
                block[active], confidence[active] = xt, sure
            if recorder is not None:
                recorder.add(
                    [active[row] for row in open_rows],
                    block,
                    [num_masked[row] for row in open_rows],
                    done.commits[open_rows].sum(-1).tolist(),
                )
            if step_callback is not None and full_logits is not None:
                step_callback(
                    step,
                    config.steps_per_block,
                    before,
                    t=sum(num_masked) / len(num_masked) / config.block_size,
                    logits=full_logits.unflatten(0, tuple(xt.shape)),
                    block_idx=block_idx,
                )
        if probs is not None:
            probs = probs.view(*block.shape, -1)
        return DenoisedBlocks(block, num_passes, confidence, probs, recorder.traces if recorder else None)

    def _modulation(self, num_masked: list[int]) -> Tensor:
        """Time modulation of rows by their masked positions, one row where all have as many."""
        alike = min(num_masked) == max(num_masked)
        return self.modulation[num_masked[:1] if alike else num_masked]

    def _exclude(self, logits: Tensor) -> None:
        """Gives ids that are never picked -inf."""
        logits[:, self.config.mask_token_id] = -torch.inf
        if self.num_token_ids is not None:
            logits[:, self.num_token_ids :] = -torch.inf


class _Recorder:
    """Collects traces while rows come and go."""

    def __init__(self, initial: list[list[int]]) -> None:
        self.traces = [BlockTrace([row], [], []) for row in initial]
        self._block_size = len(initial[0])

    def add(self, rows: list[int], block: Tensor, num_masked: list[int], num_commits: list[int]) -> None:
        for row, masked, committed in zip(rows, num_masked, num_commits, strict=True):
            trace = self.traces[row]
            trace.xt.append(block[row].tolist())
            trace.t.append(masked / self._block_size)
            trace.commits.append(committed)


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
        block_denoiser = BlockDenoiser(denoiser, config)
    block_idx = 0
    while batch.active:
        with batch.times.measure("denoise", denoiser.device):
            done = block_denoiser.denoise(
                batch.block_context(config.block_size),
                batch.active_seeds(denoiser.device),
                batch.next_positions(denoiser.device),
                with_traces,
                step_callback,
                block_idx,
            )
            blocks = done.token_ids.tolist()
        committed = []
        for i, row in enumerate(list(batch.active)):
            block = batch.commit(row, blocks[i], done.num_passes[i])
            committed.append(replace(block, trace=done.traces[i]) if done.traces else block)
        whole = {block.row: blocks[i] for i, block in enumerate(committed)}
        yield from committed
        batch.extend({row: whole[row] for row in batch.active}, want_logits=False)
        block_idx += 1
