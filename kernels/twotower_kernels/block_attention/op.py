"""Attention over keys side by side or in pages of a cache, and the mask that the towers need."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_kernels.backend import use_triton
from twotower_kernels.block_attention.types import PagedBatch

# Limits of the kernel's tiles.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 128


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
    """Attention of requests whose keys are in tensors of their own: nothing is copied together or padded.

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
    """Mask in which query i of a row sees its `prefix_lens` context keys and the block's keys up to its own.

    Args:
        prefix_lens: int64 [num_reqs], keys before the block.

    Returns:
        bool [num_reqs, num_queries, num_keys].
    """
    device = prefix_lens.device
    last_key = prefix_lens[:, None] + torch.arange(num_queries, device=device)
    return torch.arange(num_keys, device=device) <= last_key[:, :, None]


def reads_pages(cache: Tensor) -> bool:
    """Whether `paged_attention` reads keys of this cache in place, with its kernel.

    Otherwise `attention` and `ragged_attention` on views of the keys are faster.

    Args:
        cache: [..., kv_heads, head_dim], keys or values.
    """
    in_order = cache.stride(-1) == 1
    return in_order and use_triton(cache) and cache.dtype in KERNEL_DTYPES and cache.shape[-1] <= MAX_HEAD_DIM


def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch
) -> Tensor:
    """Attention of each request's queries to its context, in pages of a cache, and to the keys of the same pass.

    A request's pages beyond its context, and other pages, are not read; they may hold anything, NaN included.

    Args:
        query: [num_tokens, heads, head_dim], request after request; here and below strides are free, but head_dim is
            contiguous.
        key, value: [num_tokens, kv_heads, head_dim], of the pass itself; query head j reads kv head
            j // (heads / kv_heads).
        key_cache, value_cache: [num_pages, page_size, kv_heads, head_dim]; `key` and `value` are stored in them where
            `batch.written` says.
        batch: whose tokens and pages these are.

    Returns:
        [num_tokens, heads, head_dim]; tokens from `batch.query_start_loc[-1]` on are not defined.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    _check_paged(query, key, value, key_cache, value_cache, batch)
    if reads_pages(key_cache):
        from twotower_kernels.block_attention.kernel import launch_paged_attention

        return launch_paged_attention(query, key, value, key_cache, value_cache, batch)
    if batch.written is not None:
        places = batch.written // key_cache.shape[1], batch.written % key_cache.shape[1]
        key_cache[places], value_cache[places] = key, value
    by_views = query.shape[0] != len(batch.context_lens) * batch.max_query_len
    attend = _paged_attention_on_views if by_views else _paged_attention_padded
    return attend(query, key, value, key_cache, value_cache, batch)


def _paged_attention_padded(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch
) -> Tensor:
    """Attends where all requests bring `max_query_len` tokens; contexts are padded, and the host reads nothing."""
    num_reqs, num_queries = len(batch.context_lens), batch.max_query_len
    query, key, value = (x.unflatten(0, (num_reqs, num_queries)) for x in (query, key, value))
    table = batch.block_table.long()
    num_places = table.shape[1] * key_cache.shape[1]
    in_context = torch.arange(num_places, device=query.device) < batch.context_lens[:, None]
    # What is beyond a context counts zero times, but zero times NaN would be NaN.
    found = (
        cache[table].flatten(1, 2).masked_fill(~in_context[:, :, None, None], 0) for cache in (key_cache, value_cache)
    )
    keys, values = (torch.cat([context, own], dim=1) for context, own in zip(found, (key, value), strict=True))
    seen = in_context[:, None].expand(-1, num_queries, -1)
    own_seen = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query.device)
    own_seen = own_seen.tril() if batch.causal else own_seen
    mask = torch.cat([seen, own_seen.expand(num_reqs, -1, -1)], dim=2)
    return attention(query, keys, values, mask).flatten(0, 1)


def _paged_attention_on_views(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch
) -> Tensor:
    """Attends request by request, so that nothing is padded to the longest one."""
    bounds, lens, page_size = batch.query_start_loc.tolist(), batch.context_lens.tolist(), key_cache.shape[1]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    query_lens, masks = [], []
    for pages, context_len, (start, stop) in zip(batch.block_table, lens, pairwise(bounds), strict=True):
        if start == stop:
            continue
        own = pages[: -(-context_len // page_size)]
        for found, cache, new in ((keys, key_cache, key), (values, value_cache, value)):
            context = cache[own].flatten(0, 1)[:context_len]
            found.append(torch.cat([context, new[start:stop]]).transpose(0, 1)[None])
        query_lens.append(stop - start)
        if batch.causal:
            allowed = causal_mask(
                batch.context_lens.new_tensor([context_len]), stop - start, context_len + stop - start
            )[0]
            masks.append(query.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf))
    needs_masks = batch.causal and max(query_lens, default=0) > 1
    out = query.new_zeros(query.shape)
    if query_lens:
        seen = query[bounds[0] : bounds[-1]]
        out[bounds[0] : bounds[-1]] = ragged_attention(seen, keys, values, query_lens, masks if needs_masks else None)
    return out


def _check_paged(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch
) -> None:
    block_table, context_lens, query_start_loc = batch.block_table, batch.context_lens, batch.query_start_loc
    num_tokens, heads, head_dim = query.shape
    kv_heads, num_reqs = key.shape[1], len(context_lens)
    wanted = {
        "key": (key, (num_tokens, kv_heads, head_dim)),
        "value": (value, (num_tokens, kv_heads, head_dim)),
        "key_cache": (key_cache, (*key_cache.shape[:2], kv_heads, head_dim)),
        "value_cache": (value_cache, (*key_cache.shape[:2], kv_heads, head_dim)),
        "block_table": (block_table, (num_reqs, block_table.shape[-1])),
        "query_start_loc": (query_start_loc, (num_reqs + 1,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; beside query {list(query.shape)} give {list(shape)}"
            )
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} kv heads; give each kv head as many")
    data = (query, key, value, key_cache, value_cache)
    if any(x.dtype != query.dtype or x.stride(-1) != 1 for x in data):
        seen = [(str(x.dtype), x.stride(-1)) for x in data]
        raise ValueError(f"dtypes and strides of head_dim are {seen}; give one dtype and stride 1")
    if any(x.dtype != torch.int32 for x in (block_table, context_lens, query_start_loc)):
        raise ValueError("block_table, context_lens or query_start_loc is not int32; give int32")
    written = batch.written
    if written is not None and (written.shape != (num_tokens,) or written.dtype != torch.int64):
        raise ValueError(f"written is {written.dtype} {list(written.shape)}; give torch.int64 [{num_tokens}]")
