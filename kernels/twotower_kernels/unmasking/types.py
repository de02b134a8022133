"""Arguments and results of a denoising step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twotower_kernels.noise import gumbel_argmax


@dataclass(frozen=True)
class PickNoise:
    """Noise that picks are sampled with: `argmax(logits / temperature + gumbel_noise)`.

    Attributes:
        temperature: above 0.
        seeds: int64 [num_reqs].
        first_positions: int64 [num_reqs], index of a block's first token in its sequence.
        draw: tells the steps of a block apart.
        scores: float [num_positions, vocab] that noise is added to in place of the logits over the temperature, where
            some tokens are excluded: these have -inf, the mask token too. None for all tokens.
    """

    temperature: float
    seeds: Tensor
    first_positions: Tensor
    draw: int = 0
    scores: Tensor | None = None

    def picks(self, scores: Tensor, positions: Tensor, block_size: int) -> Tensor:
        """Samples int64 [num_positions] from the softmax of scores [num_positions, vocab] at these flat positions."""
        rows, offsets = positions // block_size, positions % block_size
        return gumbel_argmax(scores, self.seeds[rows], self.first_positions[rows] + offsets, self.draw)


@dataclass(frozen=True)
class Unmasked:
    """Blocks after a step, and what it changed.

    Attributes:
        token_ids: int64 [num_reqs, block_size], the picks at positions that were committed, as before elsewhere.
        confidence: float [num_reqs, block_size], likewise.
        commits: bool [num_reqs, block_size].
    """

    token_ids: Tensor
    confidence: Tensor
    commits: Tensor
