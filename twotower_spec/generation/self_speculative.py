"""Self-verified diffusion: the denoiser drafts, the context tower accepts, and the text is the context tower's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from twotower_spec.config import DiffusionConfig
from twotower_spec.generation.autoregressive import ar_batch
from twotower_spec.generation.batch import Batch, Prompts, Seeds, TokenIds
from twotower_spec.generation.block_diffusion import check_mask_token, host_loop
from twotower_spec.generation.denoising import DenoisingRequest, PublishedSchedule
from twotower_spec.generation.result import CommittedBlock, GenerationResult
from twotower_spec.generation.sampling import Sampler
from twotower_spec.towers.model import TwoTowers

DEFAULT_BLOCK_SIZE = 8
DEFAULT_STEPS_PER_BLOCK = 1


def generate_self_speculative(
    towers: TwoTowers,
    input_ids: Prompts,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: TokenIds = None,
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    steps_per_block: int = DEFAULT_STEPS_PER_BLOCK,
    confidence_threshold: float = 0.8,
    mask_token_id: int | None = None,
    seed: Seeds = None,
) -> GenerationResult:
    """The text of `generate_ar`, several tokens per pass of the context tower, and no second model.

    A block begins with the token that the context tower chose last; the denoiser drafts the rest. The pass that extends
    the context by the block verifies it: drafts are accepted while they are the tokens that the context tower takes
    itself (greedy, or sampled with its noise), and its state is replayed to the last of them.

    Args:
        towers: the model, with its denoiser.
        input_ids: prompts, int64 [num_reqs, num_tokens], or one list of ids per prompt (of any lengths).
        max_new_tokens: most new tokens per row.
        temperature: 0 for greedy.
        top_k: sample among the k most probable tokens; None or 0 for all.
        top_p: sample among the most probable tokens up to this probability; None or 1 for all.
        eos_token_id: an id or several ids that end a row; None to run to `max_new_tokens`.
        block_size: tokens per block, the first of which is given.
        steps_per_block: most denoising steps per block.
        confidence_threshold: picks more probable than this are committed before the last step.
        mask_token_id: None for the one of the configuration (3).
        seed: of the sampling noise; row i of a call uses `seed + i`, or give one per row. None for a random one.

    Returns:
        New tokens (an end token included), denoiser and context passes per row, times.

    Raises:
        ArgumentError: an argument is not allowed, or the denoiser is not loaded.
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
    batch = _batch(towers, input_ids, max_new_tokens, config, eos_token_id, seed)
    return batch.collect(_self_speculative(batch, config))


def stream_self_speculative(
    towers: TwoTowers,
    input_ids: Prompts,
    max_new_tokens: int = 128,
    config: DiffusionConfig | None = None,
    eos_token_id: TokenIds = None,
    *,
    seed: Seeds = None,
) -> Iterator[CommittedBlock]:
    """`generate_self_speculative` as an iterator: what every round adds to a row.

    Args:
        towers: the model, with its denoiser.
        input_ids: prompts.
        max_new_tokens: most new tokens per row.
        config: how a block is denoised, and the sampling of both towers; None for the defaults.
        eos_token_id: ids that end a row.
        seed: of the sampling noise.
    """
    config = config or DiffusionConfig(
        DEFAULT_BLOCK_SIZE, DEFAULT_STEPS_PER_BLOCK, mask_token_id=towers.config.mask_token_id
    )
    return _self_speculative(_batch(towers, input_ids, max_new_tokens, config, eos_token_id, seed), config)


def _batch(
    towers: TwoTowers,
    input_ids: Prompts,
    max_new_tokens: int,
    config: DiffusionConfig,
    eos_token_id: TokenIds,
    seed: Seeds,
) -> Batch:
    check_mask_token(towers, config)
    towers.require_denoiser()
    return ar_batch(towers, input_ids, max_new_tokens, eos_token_id, seed)


def _self_speculative(batch: Batch, config: DiffusionConfig) -> Iterator[CommittedBlock]:
    sampler = Sampler(config.temperature, config.top_k, config.top_p)
    denoiser = batch.towers.denoiser
    logits = batch.prefill()
    if logits is None:
        return
    with batch.times.measure("denoise", denoiser.device):
        loop = host_loop(denoiser, config)
    schedule = PublishedSchedule(config.confidence_threshold, config.steps_per_block)
    # The newest token of every row, which the context tower chose and has not read yet.
    newest = _choose(sampler, batch, batch.active, logits, [1] * len(batch.active))
    yield from [batch.commit(row, tokens, 0) for row, tokens in newest.items()]
    while batch.active:
        rows = list(batch.active)
        with batch.times.measure("denoise", denoiser.device):
            request = DenoisingRequest(
                batch.block_context(config.block_size),
                batch.active_seeds(denoiser.device),
                batch.next_positions(denoiser.device) - 1,
                schedule,
                first_tokens=torch.tensor([newest[row][-1] for row in rows], device=denoiser.device),
                same_noise=True,
            )
            done = loop.denoise(request)
            # The context tower may choose the mask token, which the denoiser would fill: its choice stands.
            num_passes = done.num_passes.tolist()
            blocks = {
                row: [newest[row][-1], *block[1:]][: batch.max_new_tokens - len(batch.generated[row])]
                for row, block in zip(rows, done.token_ids.tolist(), strict=True)
            }
        with batch.times.measure("extend", batch.towers.context.device):
            extension = batch.state.extend(batch.towers.context, blocks, logits="all", provisional=True)
            assert extension.logits is not None
            chosen = _choose(sampler, batch, rows, extension.logits, [len(block) for block in blocks.values()])
            accepted = {row: agreeing(blocks[row][1:], chosen[row]) for row in rows}
            extension.accept({row: 1 + count for row, count in accepted.items()})
        newest = {row: batch.up_to_end(chosen[row][: accepted[row] + 1]) for row in rows}
        yield from [batch.commit(row, newest[row], passes) for row, passes in zip(rows, num_passes, strict=True)]


@torch.inference_mode()
def _choose(sampler: Sampler, batch: Batch, rows: list[int], logits: Tensor, counts: list[int]) -> dict[int, list[int]]:
    """The context tower's tokens after each of `counts` tokens per row, from their logits [sum of counts, vocab]."""
    next_position = {row: len(batch.prompts[row]) + len(batch.generated[row]) for row in rows}
    seeds = torch.tensor([batch.seeds[row] for row, n in zip(rows, counts, strict=True) for _ in range(n)])
    positions = torch.tensor([next_position[row] + i for row, n in zip(rows, counts, strict=True) for i in range(n)])
    tokens = sampler.sample(logits, seeds.to(logits.device), positions.to(logits.device)).tolist()
    chosen, start = {}, 0
    for row, count in zip(rows, counts, strict=True):
        chosen[row] = tokens[start : start + count]
        start += count
    return chosen


def agreeing(drafts: Sequence[int], text: Sequence[int]) -> int:
    """How many drafts agree with the text, from the left."""
    for i, (draft, token) in enumerate(zip(drafts, text, strict=False)):
        if draft != token:
            return i
    return min(len(drafts), len(text))
