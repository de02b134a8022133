"""Keys and values of the attention layers, in pages."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from twotower_spec.config import TwoTowerConfig
from twotower_spec.errors import StateFullError
from twotower_spec.state.paged_keys import LayerPages
from twotower_spec.state.transfer import to_device


class PagedKVCache:
    """Keys and values of all attention layers; requests own pages of `page_size` tokens.

    Attributes:
        keys, values: [num_attention_layers, num_pages * page_size, kv_heads, head_dim], and a page more with a scratch
            page: nobody owns it, and passes of fixed shape write there what does not count.
        scratch_token: flat index of that page's first token.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scratch: bool = False,
    ) -> None:
        self.page_size, self._num_pages = page_size, num_pages
        self.scratch_token = num_pages * page_size
        num_tokens = (num_pages + scratch) * page_size
        shape = (len(config.attention_layers), num_tokens, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._free = list(range(num_pages))  # ascending

    @cached_property
    def pages(self) -> LayerPages:
        """Views of all pages."""
        return LayerPages.of(self.keys, self.values, self.page_size)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def num_free_pages(self) -> int:
        """Pages that no request owns."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int, start: int = 0) -> list[int]:
        """Takes the first free pages from page `start` on, then those before it; consecutive ones where they are.

        Raises:
            StateFullError: fewer pages are free.
        """
        if num_pages > len(self._free):
            raise StateFullError(
                f"{num_pages} KV pages were asked for and {len(self._free)} are free; release a request or give the "
                f"state more pages"
            )
        at = bisect_left(self._free, start)
        taken = self._free[at : at + num_pages]
        del self._free[at : at + num_pages]
        missing = num_pages - len(taken)
        taken += self._free[:missing]
        del self._free[:missing]
        return taken

    def release(self, pages: list[int]) -> None:
        """Gives pages back, emptied."""
        self.clear(pages)
        self._free.extend(pages)
        self._free.sort()

    @torch.inference_mode()
    def clear(self, pages: list[int]) -> None:
        """Empties pages: masked keys count zero times, but zero times NaN would be NaN."""
        index = to_device(np.array(pages, dtype=np.int64), self.keys.device)
        for cache in (self.keys, self.values):
            cache.unflatten(1, (-1, self.page_size)).index_fill_(1, index, 0)

    @torch.inference_mode()
    def reset(self) -> None:
        """Gives all pages back, emptied, whoever owned them."""
        self.keys.zero_()
        self.values.zero_()
        self._free = list(range(self._num_pages))

    def write(self, layer: int, token_index: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores keys and values [num_tokens, kv_heads, head_dim] of one layer at flat token indices [num_tokens]."""
        self.keys[layer].index_copy_(0, token_index, key)
        self.values[layer].index_copy_(0, token_index, value)

    def token_index(self, pages: list[int], start: int, stop: int) -> list[int]:
        """Flat indices of the tokens `start` to `stop - 1` of the request that owns `pages`."""
        size = self.page_size
        return [pages[t // size] * size + t % size for t in range(start, stop)]

    def tokens_of(self, pages: Tensor) -> Tensor:
        """Flat indices of the tokens of pages [...], [..., page_size]."""
        return pages[..., None] * self.page_size + torch.arange(self.page_size, device=pages.device)

    def span(self, page_lists: list[list[int]], num_tokens: int) -> TokenSpan:
        """Where the first `num_tokens` tokens of several requests are."""
        num_pages = self.pages_for(num_tokens)
        run = _as_run(page_lists, num_pages)
        if run is not None:
            first, stride = run
            return TokenSpan(len(page_lists), num_tokens, first * self.page_size, stride * self.page_size)
        # Padding repeats a page of the request itself: what it holds is masked, but must not be another one's NaN.
        padded = [pages[:num_pages] + (pages[:1] or [0]) * (num_pages - len(pages)) for pages in page_lists]
        index = self.tokens_of(to_device(padded, self.keys.device)).flatten(1)[:, :num_tokens]
        return TokenSpan(len(page_lists), num_tokens, index=index)


class SeparateKeys:
    """Keys and values of some requests, each on its own; read in place where a request's pages are consecutive."""

    def __init__(self, cache: PagedKVCache, page_lists: Sequence[list[int]], lens: Sequence[int]) -> None:
        """Looks at the first `lens` tokens of every request."""
        self._cache = cache
        self._spans = [cache.span([pages], length) for pages, length in zip(page_lists, lens, strict=True)]
        self._keys, self._values = (
            [_by_head(span.take(stored)).unbind() if span.index is None else None for span in self._spans]
            for stored in (cache.keys, cache.values)
        )

    def keys(self, layer: int) -> list[Tensor]:
        """Keys of a layer per request, [1, kv_heads, num_tokens, head_dim]."""
        return self._read(self._keys, self._cache.keys, layer)

    def values(self, layer: int) -> list[Tensor]:
        """Values of a layer, as `keys`."""
        return self._read(self._values, self._cache.values, layer)

    def _read(self, views: Sequence[Sequence[Tensor] | None], stored: Tensor, layer: int) -> list[Tensor]:
        return [
            _by_head(span.take(stored[layer])) if view is None else view[layer]
            for span, view in zip(self._spans, views, strict=True)
        ]


def _by_head(tokens: Tensor) -> Tensor:
    """[..., num_tokens, kv_heads, head_dim] to [..., kv_heads, num_tokens, head_dim]."""
    return tokens.transpose(-3, -2)


@dataclass(frozen=True)
class TokenSpan:
    """The first tokens of several requests in a paged cache: equally spaced runs, or an index per token."""

    num_reqs: int
    num_tokens: int
    first: int = 0
    stride: int = 0
    index: Tensor | None = None

    def take(self, cache: Tensor) -> Tensor:
        """Reads [..., cache tokens, kv_heads, head_dim] as [..., num_reqs, num_tokens, kv_heads, head_dim].

        A view where the requests are runs, else a copy. Beyond a request's own length it holds whatever is there.
        """
        if self.index is not None:
            return cache[..., self.index, :, :]
        *batch, token, head, one = cache.stride()
        shape = (*cache.shape[:-3], self.num_reqs, self.num_tokens, *cache.shape[-2:])
        offset = cache.storage_offset() + self.first * token
        return cache.as_strided(shape, (*batch, self.stride * token, token, head, one), offset)


def _as_run(page_lists: list[list[int]], num_pages: int) -> tuple[int, int] | None:
    """First page and distance between requests, if their first `num_pages` pages form one arithmetic pattern."""
    if num_pages == 0:
        return 0, 0
    if any(len(pages) < num_pages for pages in page_lists):
        return None
    first = page_lists[0][0]
    stride = page_lists[1][0] - first if len(page_lists) > 1 else num_pages
    for row, pages in enumerate(page_lists):
        start = first + row * stride
        if stride < 1 or pages[:num_pages] != list(range(start, start + num_pages)):
            return None
    return first, stride
