"""Where a backend of vLLM puts keys and values in its cache: found out by having it write numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twotower_kernels.block_attention.op import KERNEL_DTYPES
from twotower_spec.errors import ArgumentError

# A place is written in digits that every dtype holds exactly.
BASE, NUM_DIGITS = 256, 4
# Tokens of a page that every backend takes.
TRIAL_PAGE = 32
CPU_BACKEND = "CPU_ATTN"


def check_layout(layer: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses a layer whose keys could not be read, before its cache is allocated: in a small one of its own.

    Raises:
        ArgumentError: see `paged_views`.
    """
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise ArgumentError(f"{layer.attn_backend.get_name()} writes keys in a way of its own")
    if layer.attn_backend.get_name() == CPU_BACKEND and not hasattr(layer, "isa"):
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        # vLLM sets it a little later, by the same function.
        layer.isa = _get_attn_isa(dtype, TRIAL_PAGE, layer.head_size, layer.kv_cache_dtype)
    paged_views(layer, torch.empty(2, layer.num_kv_heads, TRIAL_PAGE, 2 * layer.head_size, dtype=dtype, device=device))


def paged_views(layer: Any, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views the keys and values of an attention layer in the pages of its cache.

    Every backend has its own layout, and the CPU's packs keys. Whichever it is, the backend itself writes numbers into
    a cache of two pages with the same strides, and each is looked for.

    Args:
        layer: vLLM's.
        cache: its cache, [num_pages, kv_heads, page_size, content], with any strides.

    Returns:
        Keys and values, each [num_pages, page_size, kv_heads, head_dim], of the cache's own memory.

    Raises:
        ArgumentError: they are not there as numbers of their own, or no strides describe where.
    """
    name = layer.attn_backend.get_name()
    if cache.dtype not in KERNEL_DTYPES or cache.dim() != 4:
        raise ArgumentError(f"{name} keeps keys as {cache.dtype} {list(cache.shape)}, not as numbers in pages")
    page_size, kv_heads, head_dim = cache.shape[2], layer.num_kv_heads, layer.head_size
    shape = (2, 2, page_size, kv_heads, head_dim)  # keys and values, pages
    place = _places(layer, cache, torch.Size(shape))
    if place is None:
        raise ArgumentError(f"{name} packs or rounds keys so that they cannot be read back")
    views = []
    for base, found in zip(place[:, 0, 0, 0, 0].tolist(), place, strict=True):
        strides = _strides(found - base)
        if strides is None or (strides[0] != cache.stride(0) and len(cache) > 1):
            raise ArgumentError(f"{name} lays out keys in a way that no strides describe")
        sizes = (len(cache), *shape[2:])
        views.append(cache.as_strided(sizes, (cache.stride(0), *strides[1:]), cache.storage_offset() + base))
    return views[0], views[1]


def _places(layer: Any, cache: Tensor, shape: torch.Size) -> Tensor | None:
    """Place in the cache's storage of every key and value, int64 of this shape; None where one is not found."""
    num_slots, device = shape[1] * shape[2], cache.device
    room = sum((size - 1) * stride for size, stride in zip((2, *cache.shape[1:]), cache.stride(), strict=True)) + 1
    storage = torch.empty(room, dtype=cache.dtype, device=device)
    trial = storage.as_strided((2, *cache.shape[1:]), cache.stride())
    codes = torch.arange(shape.numel(), device=device).view(2, num_slots, *shape[3:])
    found = torch.zeros(room, dtype=torch.int64, device=device)
    written = torch.ones(room, dtype=torch.bool, device=device)
    for digit in range(NUM_DIGITS):
        storage.fill_(torch.nan)
        keys, values = (codes // BASE**digit % BASE).to(cache.dtype)
        layer.impl.do_kv_cache_update(layer, keys, values, trial, torch.arange(num_slots, device=device))
        written &= storage.isfinite()
        found += storage.nan_to_num(nan=0.0).round().long().clamp(0, BASE - 1) * BASE**digit
    at = written.nonzero()[:, 0]
    place = torch.full((shape.numel(),), -1, device=device)
    found = found[at]
    if len(at) != len(place) or int(found.max()) >= len(place):
        return None
    place[found] = at
    return None if bool((place < 0).any()) else place.view(shape).cpu()


def _strides(offsets: Tensor) -> list[int] | None:
    """Strides of offsets [...], if there are any that give all of them."""
    strides = [int(offsets.select(axis, 1).flatten()[0]) if size > 1 else 0 for axis, size in enumerate(offsets.shape)]
    expected = torch.zeros_like(offsets)
    for axis, (size, stride) in enumerate(zip(offsets.shape, strides, strict=True)):
        expected += (torch.arange(size) * stride).view(-1, *[1] * (offsets.dim() - axis - 1))
    return strides if torch.equal(expected, offsets) else None
