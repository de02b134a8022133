"""Self-verified diffusion: the denoiser drafts, the context tower accepts, and the text is the context tower's own.

A block begins with the token that the context tower chose last; the denoiser drafts the rest. The pass that extends the
context by the block verifies it: drafts are accepted while they are the tokens that the context tower takes itself
(greedy, or sampled with its noise), and its state is replayed to the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from twotower_spec.generation.batch import Batch
from twotower_spec.generation.denoising import DenoisingRequest, HostLoop
from twotower_spec.generation.options import GenerationOptions
from twotower_spec.generation.result import CommittedBlock
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state.transfer import to_device

# Token ids per row of the batch.
TokensByRow = dict[int, list[int]]


def stream_self_speculative(batch: Batch, options: GenerationOptions) -> Iterator[CommittedBlock]:
    """Yields the text of AR, one or several tokens per row and pass of the context tower."""
    sampler, logits = options.sampler, batch.prefill()
    if logits is None:
        return
    loop = batch.denoising_loop(options)
    # The newest token of every row, which the context tower chose and has not read yet.
    newest = _choose(sampler, batch, batch.active, logits, [1] * len(batch.active))
    yield from [batch.commit(row, tokens, 0) for row, tokens in newest.items()]
    while batch.active:
        rows = list(batch.active)
        blocks, num_passes = _draft(batch, loop, options, {row: newest[row][-1] for row in rows})
        newest = _verify(batch, sampler, blocks)
        yield from [batch.commit(row, newest[row], passes) for row, passes in zip(rows, num_passes, strict=True)]


def _draft(
    batch: Batch, loop: HostLoop, options: GenerationOptions, first: dict[int, int]
) -> tuple[TokensByRow, list[int]]:
    """Blocks that begin with these tokens, cut at `max_new_tokens`, and denoiser passes per row."""
    device = batch.towers.denoiser.device
    with batch.times.measure("denoise", device):
        request = DenoisingRequest(
            context=batch.block_context(loop.block_size),
            seeds=batch.active_seeds(device),
            first_positions=batch.next_positions(device) - 1,
            commit_rule=options.schedule,
            first_tokens=to_device(list(first.values()), device),
            same_noise=True,
        )
        done = loop.denoise(request)
        drafted = zip(first.items(), done.token_ids.tolist(), strict=True)
        # The context tower may choose the mask token, which the denoiser would fill: its choice stands.
        blocks = {row: [token, *block[1:]][: batch.num_left(row)] for (row, token), block in drafted}
        return blocks, done.num_passes.tolist()


def _verify(batch: Batch, sampler: Sampler, blocks: TokensByRow) -> TokensByRow:
    """Reads blocks and keeps what the context tower writes itself; gives the accepted drafts and one token more."""
    with batch.times.measure("extend", batch.towers.context.device):
        extension = batch.state.extend(batch.towers.context, blocks, logits="all", provisional=True)
        assert extension.logits is not None
        chosen = _choose(sampler, batch, list(blocks), extension.logits, [len(block) for block in blocks.values()])
        accepted = {row: agreeing(block[1:], chosen[row]) for row, block in blocks.items()}
        extension.accept({row: 1 + count for row, count in accepted.items()})
    return {row: batch.up_to_end(chosen[row][: count + 1]) for row, count in accepted.items()}


@torch.inference_mode()
def _choose(sampler: Sampler, batch: Batch, rows: list[int], logits: Tensor, counts: list[int]) -> TokensByRow:
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
    """Counts the drafts that agree with the text, from the left."""
    for i, (draft, token) in enumerate(zip(drafts, text, strict=False)):
        if draft != token:
            return i
    return min(len(drafts), len(text))
