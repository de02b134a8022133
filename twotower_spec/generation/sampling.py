"""Logits to token ids: greedy, or sampled with counter-based noise after min-p, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_kernels.noise import gumbel_noise
from twotower_spec.config import check_sampling


@dataclass(frozen=True)
class Sampler:
    """Turns logits into scores whose argmax is the sample.

    Attributes:
        temperature: 0 for greedy.
        top_k: None or 0 for all tokens.
        top_p: None or 1 for all tokens.
        min_p: None or 0 for all tokens.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def greedy(self) -> bool:
        """Whether the scores are the logits themselves."""
        return self.temperature == 0

    def scores(self, logits: Tensor, seeds: Tensor, positions: Tensor, draw: int = 0) -> Tensor:
        """Noisy, filtered logits; their argmax is distributed as the softmax of the filtered logits.

        Args:
            logits: [num_rows, vocab]; not modified. -inf excludes a token.
            seeds: int64 [num_rows].
            positions: int64 [num_rows], index of the token in its sequence.
            draw: tells repeated draws at one position apart.
        """
        return self.filter(logits) + gumbel_noise(seeds, positions, draw, logits.shape[-1])

    def filter(self, logits: Tensor) -> Tensor:
        """Logits [..., vocab] over the temperature, excluded tokens -inf; their softmax is what is sampled from."""
        return filter_logits(logits / self.temperature, self.top_k, self.top_p, self.min_p)

    def probs(self, logits: Tensor) -> Tensor:
        """The distribution that is sampled from, shaped like `logits`; all on the argmax when greedy."""
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.softmax(self.filter(logits), dim=-1)

    def sample(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """Token ids int64 [num_rows]; arguments as `scores`."""
        return (logits if self.greedy else self.scores(logits, seeds, positions)).argmax(dim=-1)


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None = None) -> Tensor:
    """Excludes tokens by min-p, then by top-k, then by top-p on what is left; excluded tokens get -inf.

    Min-p keeps tokens at least `min_p` times as probable as the most probable one. Ties with the k-th token stay. Top-p
    keeps the most probable tokens up to and including the one that makes their sum exceed `top_p`.

    Source: modeling_nemotron_twotower.py, _sample_token; min-p comes first as in vLLM.
    """
    if min_p:
        bound = logits.max(dim=-1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < bound, -torch.inf)
    if top_k and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = torch.sort(logits, dim=-1, descending=True)
        reached = torch.softmax(ordered, dim=-1).cumsum(-1) > top_p
        beyond = torch.zeros_like(reached)
        beyond[..., 1:] = reached[..., :-1]
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
    return logits


def signed_seed(seed: int) -> int:
    """A seed as a signed 64-bit integer, whatever it was."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
