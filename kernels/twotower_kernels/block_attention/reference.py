"""Softmax attention written out."""

import math

import torch
from torch import Tensor


def attention_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """What `attention` computes. Same arguments and result."""
    per_group = query.shape[2] // key.shape[2]
    key = key.repeat_interleave(per_group, dim=2)
    value = value.repeat_interleave(per_group, dim=2)
    scores = torch.einsum("rqhd,rkhd->rhqk", query, key) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("rhqk,rkhd->rqhd", torch.softmax(scores, dim=-1), value)
