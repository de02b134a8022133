"""Attention of a few queries per request over pages of a cache and the pass's own keys.

Source: FlashAttention-2 (Dao 2023), algorithm 1, for the softmax while keys stream by; Flash-Decoding (Dao et al. 2023)
for the splits of a long context.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.backend import on_its_device
from twotower_kernels.block_attention.types import PagedBatch
from twotower_kernels.tuning import cdiv, next_power_of_2, settings

# Programs that fill a GPU twice over. A constant, so that results do not depend on the device.
PROGRAMS_WANTED = 256
# Written out, because Triton's default is about to change.
LAUNCH = {"enable_fp_fusion": True}


@triton.jit
def _absorb(
    queries,  # [BLOCK_ROWS, BLOCK_DIM]
    key_rows,  # pointers [BLOCK_KEYS]
    value_rows,  # pointers [BLOCK_KEYS]
    inside,  # [BLOCK_KEYS, BLOCK_DIM], where keys and values are
    allowed,  # [BLOCK_ROWS or 1, BLOCK_KEYS], where scores count
    dim,  # [1, BLOCK_DIM]
    scale,
    weighted,  # [BLOCK_ROWS, BLOCK_DIM], values seen so far times exp2(score - best)
    best,  # [BLOCK_ROWS], highest score so far
    total,  # [BLOCK_ROWS], sum of exp2(score - best) so far
    PRECISION: tl.constexpr,
):
    # 0 where there is no key: a masked value has weight 0, but 0 times NaN would be NaN.
    keys = tl.load(key_rows[:, None] + dim, mask=inside, other=0.0)
    values = tl.load(value_rows[:, None] + dim, mask=inside, other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    scores = tl.where(allowed, scores, -float("inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    # Where a row has seen no key yet, -inf - -inf would be NaN.
    shift = tl.where(new_best == -float("inf"), 0.0, new_best)
    weights = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(best - shift)
    weighted = tl.dot(weights.to(values.dtype), values, weighted * kept[:, None], input_precision=PRECISION)
    return weighted, new_best, total * kept + tl.sum(weights, axis=1)


@triton.jit(
    do_not_specialize=["table_stride", "num_tokens", "num_parts"],
    # These may be parts of one tensor, at any offset.
    do_not_specialize_on_alignment=["block_table", "context_lens", "query_start_loc", "written"],
)
def attend_kernel(
    query,  # [num_tokens, kv_heads * GROUP, HEAD_DIM]
    key,  # [num_tokens, kv_heads, HEAD_DIM]
    value,  # [num_tokens, kv_heads, HEAD_DIM]
    key_cache,  # [num_pages, PAGE_SIZE, kv_heads, HEAD_DIM]
    value_cache,  # [num_pages, PAGE_SIZE, kv_heads, HEAD_DIM]
    block_table,  # int32 [num_reqs, max_pages]
    context_lens,  # int32 [num_reqs]
    query_start_loc,  # int32 [num_reqs + 1]
    written,  # int64 [num_tokens], where keys and values go in the caches; None leaves these as they are
    out,  # [num_tokens, kv_heads * GROUP, HEAD_DIM]; with SPLIT float32, num_parts of them
    log_totals,  # float32 [num_parts, num_tokens, kv_heads * GROUP], to the base 2; None without SPLIT
    scale,  # of the scores, log2(e) included
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    key_cache_page_stride,
    key_cache_token_stride,
    key_cache_head_stride,
    value_cache_page_stride,
    value_cache_token_stride,
    value_cache_head_stride,
    table_stride,
    num_tokens,
    num_parts,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Program (i, j, r * num_parts + p): rows of tile i, of kv head j, of request r, over part p of its keys.

    The rows of a kv head are its GROUP query heads of the first query, then those of the second, and so on. The keys of
    a request are its context's and behind them its own, which stand elsewhere.
    """
    first_row = tl.program_id(0) * BLOCK_ROWS
    kv_head = tl.program_id(1).to(tl.int64)
    request = (tl.program_id(2) // num_parts).to(tl.int64)
    part = tl.program_id(2) % num_parts
    first_token = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - first_token
    if first_row >= num_queries * GROUP:
        return
    context_len = tl.load(context_lens + request)
    start, stop = 0, context_len + num_queries
    if CAUSAL:
        stop = context_len + tl.minimum(num_queries, (first_row + BLOCK_ROWS - 1) // GROUP + 1)
    if SPLIT:
        # Each request divides its own length, so that the parts of a short context are as even as those of a long one.
        share = tl.cdiv(tl.cdiv(stop, num_parts), BLOCK_KEYS) * BLOCK_KEYS
        start = part * share
        stop = tl.minimum(start + share, stop)

    row = first_row + tl.arange(0, BLOCK_ROWS)
    query_index = row // GROUP
    token = first_token.to(tl.int64) + query_index
    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    wanted = (query_index < num_queries)[:, None] & (dim < HEAD_DIM)
    query_rows = query + token * query_token_stride + head * query_head_stride
    queries = tl.load(query_rows[:, None] + dim, mask=wanted, other=0.0)

    weighted = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=tl.float32)
    best = tl.full([BLOCK_ROWS], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)

    pages = block_table + request * table_stride
    key_cache += kv_head * key_cache_head_stride
    value_cache += kv_head * value_cache_head_stride
    context_stop = tl.minimum(stop, context_len)
    for first in range(start, context_stop, BLOCK_KEYS):
        position = first + tl.arange(0, BLOCK_KEYS)
        present = position < context_stop
        page = tl.load(pages + position // PAGE_SIZE, mask=present, other=0).to(tl.int64)
        in_page = (position % PAGE_SIZE).to(tl.int64)
        key_rows = key_cache + page * key_cache_page_stride + in_page * key_cache_token_stride
        value_rows = value_cache + page * value_cache_page_stride + in_page * value_cache_token_stride
        inside, allowed = present[:, None] & (dim < HEAD_DIM), present[None, :]
        weighted, best, total = _absorb(
            queries, key_rows, value_rows, inside, allowed, dim, scale, weighted, best, total, PRECISION
        )

    key += first_token.to(tl.int64) * key_token_stride + kv_head * key_head_stride
    value += first_token.to(tl.int64) * value_token_stride + kv_head * value_head_stride
    own_stop = stop - context_len
    for first in range(tl.maximum(start - context_len, 0), own_stop, BLOCK_KEYS):
        position = first + tl.arange(0, BLOCK_KEYS)
        present = position < own_stop
        key_rows = key + position.to(tl.int64) * key_token_stride
        value_rows = value + position.to(tl.int64) * value_token_stride
        inside, allowed = present[:, None] & (dim < HEAD_DIM), present[None, :]
        if CAUSAL:
            allowed = allowed & (position[None, :] <= query_index[:, None])
        weighted, best, total = _absorb(
            queries, key_rows, value_rows, inside, allowed, dim, scale, weighted, best, total, PRECISION
        )

    averaged = weighted / total[:, None]
    place = token * (tl.num_programs(1) * GROUP) + head
    if SPLIT:
        place += part.to(tl.int64) * num_tokens * (tl.num_programs(1) * GROUP)
        tl.store(log_totals + place, best + tl.log2(total), mask=query_index < num_queries)
        # A part without keys has no average; the second kernel skips it.
        wanted = wanted & (query_index < tl.where(start < stop, num_queries, 0))[:, None]
    tl.store(out + place[:, None] * HEAD_DIM + dim, averaged.to(out.dtype.element_ty), mask=wanted)
    if written is not None:  # noqa: SIM102 - decided when the kernel is compiled, unlike the next one
        # No program of this launch reads what one writes: contexts end before it.
        if (first_row == 0) & (part == 0):
            for first in range(0, num_queries, BLOCK_KEYS):
                position = first + tl.arange(0, BLOCK_KEYS)
                inside = (position < num_queries)[:, None] & (dim < HEAD_DIM)
                at = tl.load(written + first_token + position, mask=position < num_queries, other=0)
                page, in_page = at // PAGE_SIZE, at % PAGE_SIZE
                keys = tl.load(key + position.to(tl.int64)[:, None] * key_token_stride + dim, mask=inside, other=0.0)
                key_rows = key_cache + page * key_cache_page_stride + in_page * key_cache_token_stride
                tl.store(key_rows[:, None] + dim, keys, mask=inside)
                values = tl.load(
                    value + position.to(tl.int64)[:, None] * value_token_stride + dim, mask=inside, other=0.0
                )
                value_rows = value_cache + page * value_cache_page_stride + in_page * value_cache_token_stride
                tl.store(value_rows[:, None] + dim, values, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def combine_kernel(
    averages,  # float32 [num_parts, num_rows, HEAD_DIM]; rows are the heads of every token
    log_totals,  # float32 [num_parts, num_rows], to the base 2; -inf where a part had no keys
    out,  # [num_rows, HEAD_DIM]
    num_rows,
    num_parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Averages the parts of a softmax by their totals."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    in_head = dim[None, :] < HEAD_DIM
    weighted = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=tl.float32)
    best = tl.full([BLOCK_ROWS], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for part in range(num_parts):
        place = part * num_rows + row
        log_total = tl.load(log_totals + place, mask=row < num_rows, other=-float("inf"))
        # Not `>`, which would drop a request's own NaN instead of passing it on.
        written = (log_total != -float("inf"))[:, None] & in_head
        average = tl.load(averages + place[:, None] * HEAD_DIM + dim[None, :], mask=written, other=0.0)
        new_best = tl.maximum(best, log_total)
        shift = tl.where(new_best == -float("inf"), 0.0, new_best)
        kept, weight = tl.exp2(best - shift), tl.exp2(log_total - shift)
        weighted = weighted * kept[:, None] + average * weight[:, None]
        total = total * kept + weight
        best = new_best
    mask = (row < num_rows)[:, None] & in_head
    combined = (weighted / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * HEAD_DIM + dim[None, :], combined, mask=mask)


@on_its_device
def launch_paged_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch
) -> Tensor:
    """Launches the kernel, and a second one that joins the parts of contexts where these are split.

    See `paged_attention`. Contexts are split where they may be long and programs are few; the number of parts follows
    from shapes alone, so that nothing waits for the device.
    """
    num_tokens, heads, head_dim = query.shape
    kv_heads, num_reqs, max_query_len = key.shape[1], len(batch.context_lens), batch.max_query_len
    group = heads // kv_heads
    out = query.new_empty(query.shape)
    if num_tokens == 0 or num_reqs == 0:
        return out
    chosen = dict(settings("block_attention", attend_settings(query.dtype, max_query_len * group)))
    keys_per_part = chosen.pop("KEYS_PER_PART")
    tiles = cdiv(max_query_len * group, chosen["BLOCK_ROWS"])
    parts = parts_of_context(
        tiles * kv_heads * num_reqs, batch.block_table.shape[1] * key_cache.shape[1], keys_per_part
    )
    averages, log_totals = out, None
    if parts > 1:
        averages = query.new_empty((parts, *query.shape), dtype=torch.float32)
        log_totals = query.new_empty((parts, num_tokens, heads), dtype=torch.float32)
    shape = {"HEAD_DIM": head_dim, "BLOCK_DIM": max(16, next_power_of_2(head_dim))}
    attend_kernel[(tiles, kv_heads, num_reqs * parts)](
        query,
        key,
        value,
        key_cache,
        value_cache,
        batch.block_table,
        batch.context_lens,
        batch.query_start_loc,
        batch.written,
        averages,
        log_totals,
        math.log2(math.e) / math.sqrt(head_dim),
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        batch.block_table.stride(0),
        num_tokens,
        parts,
        GROUP=group,
        PAGE_SIZE=key_cache.shape[1],
        CAUSAL=batch.causal,
        SPLIT=parts > 1,
        PRECISION=precision_of(query.dtype),
        **shape,
        **chosen,
        **LAUNCH,
    )
    if parts > 1:
        num_rows, combining = num_tokens * heads, settings("block_attention", "combine")
        combine_kernel[(cdiv(num_rows, combining["BLOCK_ROWS"]),)](
            averages, log_totals, out, num_rows, parts, **shape, **combining, **LAUNCH
        )
    return out


def attend_settings(dtype: torch.dtype, num_rows: int) -> str:
    """Name in the table of settings for `num_rows` rows of a kv head: queries times heads of its group."""
    if dtype == torch.float32:
        return "attend_float32"  # takes twice the room, and no tensor cores
    return "attend_few_rows" if num_rows <= 16 else "attend"


def parts_of_context(num_programs: int, max_context_len: int, keys_per_part: int) -> int:
    """Parts that every context is divided into, so that `num_programs` programs become enough to fill a GPU."""
    return max(1, min(PROGRAMS_WANTED // num_programs, max_context_len // keys_per_part))


def precision_of(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
