"""The request that a denoising loop serves, and its result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_spec.config import accumulation_dtype
from twotower_spec.generation.denoising.commit_rules import CommitRule
from twotower_spec.state import BlockContext
from twotower_spec.towers import DenoiserTower


@dataclass(frozen=True)
class DenoisingRequest:
    """One block per row that a loop is to fill. Nothing in it is read by the host while the loop runs.

    Attributes:
        context: state of the rows, read only.
        seeds: int64 [num_reqs], of the sampling noise.
        first_positions: int64 [num_reqs], index of each block's first token in its sequence.
        commit_rule: decides what each step commits. One that never finishes a block gets `block_size` steps.
        first_tokens: int64 [num_reqs], the first token of every block where it is known already; None masks it.
        first_confidence: float [num_reqs], how probable the first tokens are; None for certain.
        num_wanted: positions of a block that are filled, from the left; the others stay masked, and the commit rule
            does not see them as such. It is for rules that commit everything in the first step, which fill these
            positions as they would in a whole block. None for all.
        same_noise: whether every step samples with the noise of draw 0 instead of its own.
    """

    context: BlockContext
    seeds: Tensor
    first_positions: Tensor
    commit_rule: CommitRule
    first_tokens: Tensor | None = None
    first_confidence: Tensor | None = None
    num_wanted: int | None = None
    same_noise: bool = False


@dataclass(frozen=True)
class DenoisedBlocks:
    """One filled block per row.

    Attributes:
        token_ids: int64 [num_reqs, block_size], on the denoiser's device.
        confidence: float [num_reqs, block_size], of each token in the step that committed it; first tokens that were
            given keep the confidence of the request.
        num_passes: int64 [num_reqs], denoiser passes each row took part in. It lies where the loop counted: on the host
            or on the denoiser's device. Read it once, at the end.
    """

    token_ids: Tensor
    confidence: Tensor
    num_passes: Tensor


def fresh_blocks(
    denoiser: DenoiserTower, request: DenoisingRequest, block_size: int, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """Makes blocks of masked positions, but for first tokens that are known, and their confidence.

    Returns:
        Token ids int64 and confidence [num_reqs, block_size], on the denoiser's device; 1 at masked positions.
    """
    token_ids = denoiser.initial_block(len(request.seeds), block_size, mask_token_id)
    confidence = torch.ones(token_ids.shape, dtype=accumulation_dtype(denoiser.dtype), device=token_ids.device)
    if request.first_tokens is not None:
        token_ids[:, 0] = request.first_tokens
        if request.first_confidence is not None:
            confidence[:, 0] = request.first_confidence
    return token_ids, confidence
