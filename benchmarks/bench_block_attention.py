"""Attention over a paged context beside padded SDPA, SDPA on views, and vLLM's FlashAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import OURS, Case, Systems, one_by_one, side_by_side
from benchmarks.shapes import REAL_SIZE
from twotower_kernels.block_attention import PagedBatch, causal_mask, paged_attention, ragged_attention

BLOCK_SIZE = 16
PAGE_SIZE = 16
DTYPE = torch.bfloat16
HEADS, KV_HEADS, HEAD_DIM = REAL_SIZE.num_attention_heads, REAL_SIZE.num_key_value_heads, REAL_SIZE.head_dim

Arguments = dict[str, Any]


def cases(device: torch.device) -> list[Case]:
    """Blocks of the denoiser, and single tokens or drafts of the context tower, on contexts of different lengths."""
    if device.type == "cpu":
        return [_case(device, *shape) for shape in ((1, 256, 16, False), (4, 256, 16, False), (4, 256, 1, True))]
    sizes = [(num_reqs, context) for num_reqs in (1, 8, 64) for context in (512, 8192)]
    steps = [(BLOCK_SIZE, False), (BLOCK_SIZE, True), (1, True)]
    return [_case(device, *size, *step) for step in steps for size in sizes]


def _case(device: torch.device, num_reqs: int, context: int, queries: int, causal: bool) -> Case:
    def make() -> Systems:
        arguments = inputs(device, num_reqs, context, queries, causal)
        functions = {OURS: paged_attention, "torch composition": padded_sdpa, "SDPA on views": on_views(arguments)}
        if device.type == "cuda":
            functions |= vllm_flash_attention(arguments)
        wide = {name: _wide(value) for name, value in arguments.items()}
        expected = on_views(wide)(**wide)
        for function in functions.values():
            # Weights and results are rounded to 8 bits.
            assert (function(**arguments).double() - expected).norm() < 2**-7 * expected.norm()
        return {name: lambda function=function: function(**arguments) for name, function in functions.items()}

    num_keys = sum(context_lens(num_reqs, context)) + num_reqs * queries
    bytes_moved = DTYPE.itemsize * HEAD_DIM * (2 * KV_HEADS * num_keys + 2 * HEADS * num_reqs * queries)
    kernel = "attend_few_rows" if queries == 1 else "attend"
    shape = f"[{num_reqs}, {queries}{' causal' * causal}] on {context} tokens, {HEADS}/{KV_HEADS}x{HEAD_DIM} bf16"
    return Case("block_attention", kernel, shape, bytes_moved, make)


def context_lens(num_reqs: int, context: int) -> list[int]:
    """Context length of every request, from the full length down to half of it."""
    return [context - row * context // (2 * num_reqs) for row in range(num_reqs)]


def inputs(device: torch.device, num_reqs: int, context: int, queries: int, causal: bool) -> Arguments:
    """Makes inputs with scattered pages; queries and keys are parts of one projection."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPE)

    pages = context // PAGE_SIZE
    table = torch.randperm(num_reqs * pages, generator=generator, device=device).view(num_reqs, pages)
    query, key, value = randn(num_reqs * queries, HEADS + 2 * KV_HEADS, HEAD_DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_cache": randn(num_reqs * pages, PAGE_SIZE, KV_HEADS, HEAD_DIM),
        "value_cache": randn(num_reqs * pages, PAGE_SIZE, KV_HEADS, HEAD_DIM),
        "batch": PagedBatch(
            block_table=table.int(),
            context_lens=torch.tensor(context_lens(num_reqs, context), dtype=torch.int32, device=device),
            query_start_loc=torch.arange(num_reqs + 1, dtype=torch.int32, device=device) * queries,
            max_query_len=queries,
            causal=causal,
        ),
    }


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def padded_sdpa(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch
) -> Tensor:
    """Attends as one would without a kernel: pages gathered, the block's keys after them, padding masked."""
    num_reqs, max_query_len = len(batch.context_lens), batch.max_query_len
    query, key, value = (x.unflatten(0, (num_reqs, max_query_len)) for x in (query, key, value))
    context_keys, context_values = (cache[batch.block_table].flatten(1, 2) for cache in (key_cache, value_cache))
    keys, values = torch.cat([context_keys, key], 1), torch.cat([context_values, value], 1)
    in_context = torch.arange(context_keys.shape[1], device=query.device) < batch.context_lens[:, None]
    own = torch.ones(max_query_len, max_query_len, dtype=torch.bool, device=query.device)
    own = own.tril() if batch.causal else own
    mask = torch.cat(
        [in_context[:, None].expand(-1, max_query_len, -1), own.expand(num_reqs, max_query_len, max_query_len)], 2
    )
    q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def laid_out(arguments: Arguments) -> list[list[Tensor]]:
    """Keys and values of every request, its context's and then its own, each [num_keys, kv_heads, head_dim]."""
    batch: PagedBatch = arguments["batch"]
    queries, lens = batch.max_query_len, batch.context_lens.tolist()
    table = batch.block_table
    return [
        [
            torch.cat([cache[row].flatten(0, 1)[:n], new])
            for row, n, new in zip(table, lens, own.split(queries), strict=True)
        ]
        for cache, own in ((arguments["key_cache"], arguments["key"]), (arguments["value_cache"], arguments["value"]))
    ]


def on_views(arguments: Arguments) -> Callable[..., Tensor]:
    """Attends as the towers do on a CPU: SDPA per request on keys side by side. Laying them out is not timed."""
    batch: PagedBatch = arguments["batch"]
    queries, lens = batch.max_query_len, batch.context_lens.tolist()
    keys, values = ([one.transpose(0, 1)[None] for one in rows] for rows in laid_out(arguments))
    masks = None
    if batch.causal and queries > 1:
        allowed = [causal_mask(batch.context_lens.new_tensor([n]), queries, n + queries)[0] for n in lens]
        masks = [arguments["query"].new_zeros(one.shape).masked_fill_(~one, -torch.inf) for one in allowed]
    return lambda query, **_: ragged_attention(query, keys, values, [queries] * len(lens), masks)


def vllm_flash_attention(arguments: Arguments) -> dict[str, Callable[..., Tensor]]:
    """FlashAttention, where vLLM is installed; it reads the pass's keys from the cache; writing them is not timed."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return {}
    rows = laid_out(arguments)
    batch: PagedBatch = arguments["batch"]
    key_lens = batch.context_lens + batch.max_query_len
    longest = int(key_lens.max())
    width = -(-longest // PAGE_SIZE)
    shape = (len(key_lens), width * PAGE_SIZE, KV_HEADS, HEAD_DIM)
    caches = [arguments["query"].new_zeros(shape) for _ in rows]
    for cache, requests in zip(caches, rows, strict=True):
        for room, one in zip(cache, requests, strict=True):
            room[: len(one)] = one
    keys, values = (cache.view(-1, PAGE_SIZE, KV_HEADS, HEAD_DIM) for cache in caches)
    table = torch.arange(len(keys), dtype=torch.int32, device=keys.device).view(-1, width)

    def attend(query: Tensor, **_: Any) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            query,
            keys,
            values,
            batch.max_query_len,
            batch.query_start_loc,
            longest,
            seqused_k=key_lens,
            block_table=table,
            causal=batch.causal,
        )
        return out

    return {"vLLM FlashAttention": attend}


@one_by_one(cases(torch.device("cpu")))
def test_block_attention(benchmark: BenchmarkFixture, case: Case) -> None:
    side_by_side(benchmark, case)
