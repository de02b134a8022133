"""Attention over keys that the caller laid out, and the two masks the towers need."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads and no positional encoding.

    Args:
        query: [num_reqs, num_queries, heads, head_dim].
        key, value: [num_reqs, num_keys, kv_heads, head_dim]; query head j reads kv head j // (heads / kv_heads).
        mask: bool [num_reqs, num_queries or 1, num_keys], True where a key may be seen, or a float one to be added to
            the scores; None for all.

    Returns:
        [num_reqs, num_queries, heads, head_dim].
    """
    num_reqs, num_queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if mask is not None and mask.shape[1] > 1:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], enable_gqa=heads != kv_heads)
        return out.transpose(1, 2)
    # One mask for all queries: the heads of a group become more queries of their kv head, keys stay where they are.
    folded = query.reshape(num_reqs, kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=None if mask is None else mask[:, None])
    return out.view(num_reqs, heads, num_queries, head_dim).transpose(1, 2)


def ragged_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    query_lens: Sequence[int],
    masks: Sequence[Tensor] | None = None,
) -> Tensor:
    """`attention` of requests whose keys lie apart, each as many as it has: nothing is copied together or padded.

    Args:
        query: [num_tokens, heads, head_dim], request after request.
        keys, values: per request [1, kv_heads, num_keys, head_dim].
        query_lens: queries per request.
        masks: per request, added to the scores [num_queries, num_keys]; None where all queries see all keys.

    Returns:
        [num_tokens, heads, head_dim].
    """
    heads, kv_heads = query.shape[1], keys[0].shape[1]
    # Without masks the heads of a group become more queries of their kv head, as in `attention`.
    lanes = kv_heads if masks is None else heads
    width = heads // lanes
    folded = query.unflatten(1, (lanes, width)).transpose(0, 1).flatten(1, 2)[None]
    parts = folded.split([length * width for length in query_lens], dim=2)
    added: Sequence[Tensor | None] = masks if masks is not None else [None] * len(parts)
    out = [
        F.scaled_dot_product_attention(part, key, value, attn_mask=mask, enable_gqa=lanes != kv_heads)
        for part, key, value, mask in zip(parts, keys, values, added, strict=True)
    ]
    attended: Tensor = torch.cat(out, dim=2)[0].unflatten(1, (-1, width)).transpose(0, 1).flatten(1, 2)
    return attended


def causal_mask(prefix_lens: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Query i of a row sees its `prefix_lens` context keys and the block's keys up to its own.

    Args:
        prefix_lens: int64 [num_reqs], keys before the block.

    Returns:
        bool [num_reqs, num_queries, num_keys].
    """
    device = prefix_lens.device
    last_key = prefix_lens[:, None] + torch.arange(num_queries, device=device)
    return torch.arange(num_keys, device=device) <= last_key[:, :, None]
