"""Logits to token ids: greedy, or sampled with counter-based noise after min-p, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_kernels.acceptance import SamplingTensors, accept, filtered_logits
from twotower_spec.config import check_sampling


@dataclass(frozen=True)
class Sampler:
    """Temperature and filters, the same for all rows.

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
        """Whether the sample is the most probable token."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether tokens may be excluded."""
        return bool(self.top_k) or (self.top_p is not None and self.top_p < 1) or bool(self.min_p)

    def sampling(self, seeds: Tensor, positions: Tensor, dtype: torch.dtype = torch.float32) -> SamplingTensors:
        """Expands the parameters to tensors, for requests with these int64 [num_reqs] seeds and first positions.

        They are in the dtype that logits of `dtype` are widened to, so that float64 models sample in float64.
        """
        wide = torch.promote_types(dtype, torch.float32)

        def every(value: float | None, kind: torch.dtype = wide) -> Tensor | None:
            return torch.full(seeds.shape, value, dtype=kind, device=seeds.device) if value else None

        top_p = self.top_p if self.top_p is not None and self.top_p < 1 else None
        top_k = every(self.top_k, torch.int32)
        return SamplingTensors(every(self.temperature), top_k, every(top_p), every(self.min_p), seeds, positions)

    def sample(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """Token ids int64 [num_rows], distributed as the softmax of the filtered logits.

        Args:
            logits: [num_rows, vocab]; not modified. -inf excludes a token.
            seeds: int64 [num_rows].
            positions: int64 [num_rows], index of the token in its sequence.
        """
        no_drafts = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
        sampling = self.sampling(seeds, positions, logits.dtype)
        return accept(logits, no_drafts[:0], no_drafts, 0, sampling, "coupled").token_ids[:, 0].long()

    def filter(self, logits: Tensor) -> Tensor:
        """Logits [..., vocab] over the temperature, excluded tokens -inf; their softmax is what is sampled from.

        Min-p keeps tokens at least `min_p` times as probable as the most probable one, top-k and top-p those that are
        at least as probable as the last one that is needed.

        Source: modeling_nemotron_twotower.py, _sample_token; min-p comes first as in vLLM.
        """
        rows = logits.reshape(-1, logits.shape[-1])
        zero = torch.zeros(1, dtype=torch.int64, device=logits.device)
        return filtered_logits(rows, zero.expand(len(rows)), self.sampling(zero, zero, logits.dtype)).view_as(logits)

    def probs(self, logits: Tensor) -> Tensor:
        """The distribution that is sampled from, shaped like `logits`; all on the argmax when greedy."""
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.softmax(self.filter(logits), dim=-1)


def signed_seed(seed: int) -> int:
    """Maps any integer to a signed 64-bit seed."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
