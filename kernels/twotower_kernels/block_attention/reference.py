"""Softmax attention written out."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from twotower_kernels.block_attention.types import PagedBatch


def attention_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes what `attention` does. Same arguments and result."""
    per_group = query.shape[2] // key.shape[2]
    key = key.repeat_interleave(per_group, dim=2)
    value = value.repeat_interleave(per_group, dim=2)
    scores = torch.einsum("rqhd,rkhd->rhqk", query, key) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("rhqk,rkhd->rqhd", torch.softmax(scores, dim=-1), value)


def paged_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch
) -> Tensor:
    """Computes what `paged_attention` does. Same arguments and result."""
    bounds, lens, page_size = batch.query_start_loc.tolist(), batch.context_lens.tolist(), key_cache.shape[1]
    assert max(stop - start for start, stop in pairwise(bounds)) <= batch.max_query_len
    out = torch.empty_like(query)
    for pages, context_len, (start, stop) in zip(batch.block_table, lens, pairwise(bounds), strict=True):
        of_token = [int(pages[t // page_size]) for t in range(context_len)]
        in_page = [t % page_size for t in range(context_len)]
        keys, values = (
            torch.cat([key_cache[of_token, in_page], key[start:stop]]),
            torch.cat([value_cache[of_token, in_page], value[start:stop]]),
        )
        position = torch.arange(len(keys), device=keys.device)
        mask = (position <= position[context_len:, None])[None] if batch.causal else None
        own_query, keys, values = (x[None].float() for x in (query[start:stop], keys, values))
        out[start:stop] = attention_reference(own_query, keys, values, mask)[0]
    return out
