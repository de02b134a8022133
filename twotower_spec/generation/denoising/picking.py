"""Picking tokens at masked positions: the sampler, and the ids that are never picked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_kernels.unmasking import PickNoise, pick_tokens
from twotower_spec.generation.sampling import Sampler


@dataclass(frozen=True)
class TokenPicker:
    """Picks tokens from the denoiser's logits.

    Attributes:
        sampler: temperature and filters.
        mask_token_id: never picked, and not part of any softmax.
        num_token_ids: ids from this one on are never picked; None allows the whole vocabulary.
    """

    sampler: Sampler
    mask_token_id: int
    num_token_ids: int | None = None

    def exclude_(self, logits: Tensor) -> Tensor:
        """Gives ids that are never picked -inf, in place.

        Args:
            logits: [num_positions, vocab].
        """
        logits[:, self.mask_token_id] = -torch.inf
        if self.num_token_ids is not None:
            logits[:, self.num_token_ids :] = -torch.inf
        return logits

    def noise(self, logits: Tensor, seeds: Tensor, first_positions: Tensor, draw: int = 0) -> PickNoise | None:
        """Noise that picks are sampled with; None for the most probable token.

        Args:
            logits: [num_positions, vocab]; with filters, ids that are never picked have -inf afterwards.
            seeds: int64 [num_reqs].
            first_positions: int64 [num_reqs], index of each block's first token in its sequence.
            draw: tells repeated draws at one position apart.
        """
        if self.sampler.greedy:
            return None
        scores = self.sampler.filter(self.exclude_(logits)) if self.sampler.filters else None
        return PickNoise(self.sampler.temperature, seeds, first_positions, draw, scores)

    def pick(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """One token per row, and how probable it is at temperature 1.

        Args:
            logits: [num_reqs, vocab]; ids that are never picked have -inf afterwards.
            seeds: int64 [num_reqs].
            positions: int64 [num_reqs], index of the token in each sequence.
        """
        noise = self.noise(self.exclude_(logits), seeds, positions)
        return pick_tokens(logits, self.mask_token_id, noise=noise)

    def probs(self, logits: Tensor) -> Tensor:
        """The distributions [num_positions, vocab] that picks are drawn from.

        Args:
            logits: [num_positions, vocab]; ids that are never picked have -inf afterwards.
        """
        return self.sampler.probs(self.exclude_(logits))
