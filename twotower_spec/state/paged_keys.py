"""Keys and values that a kernel reads where they lie in pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from twotower_kernels.block_attention import PagedBatch, paged_attention
from twotower_spec.state.transfer import moved, to_device


@dataclass(frozen=True)
class LayerPages:
    """Keys and values in pages, wherever they are.

    Attributes:
        keys, values: of every attention layer, [num_pages, page_size, kv_heads, head_dim], with any strides.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, page_size: int) -> LayerPages:
        """Divides rooms [num_attention_layers, num_tokens, kv_heads, head_dim] into pages."""
        rooms = (room[:, : room.shape[1] // page_size * page_size] for room in (keys, values))
        return cls(*(room.unflatten(1, (-1, page_size)).unbind() for room in rooms))

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.keys[0].shape[1]

    def are_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether there are any, and all are on a device and of a dtype."""
        return bool(self.keys) and all((keys.device, keys.dtype) == (device, dtype) for keys in self.keys)

    def select(self, layers: Sequence[int]) -> LayerPages:
        """The same for some of the layers, in the given order."""
        return LayerPages([self.keys[layer] for layer in layers], [self.values[layer] for layer in layers])

    def copy_tokens(self, pages: list[int], keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Copies the first tokens of a request, all layers.

        Args:
            pages: of the request.
            keys, values: of every layer, [num_tokens, kv_heads, head_dim], on any device and of any dtype; written.
        """
        for sources, targets in ((self.keys, keys), (self.values, values)):
            for source, target in zip(sources, targets, strict=True):
                num_full, rest = divmod(len(target), self.page_size)
                full = target[: len(target) - rest].unflatten(0, (num_full, self.page_size))
                full.copy_(source[_as_index(pages[:num_full])])
                if rest:
                    target[len(target) - rest :] = source[pages[num_full], :rest]

    def copy_pages(self, pages: list[int], keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Copies pages, all layers, to the front of others: `keys` and `values` are those of `LayerPages`."""
        for sources, targets in ((self.keys, keys), (self.values, values)):
            for source, target in zip(sources, targets, strict=True):
                target[: len(pages)] = source[to_device(pages, source.device, torch.long)]


def _as_index(pages: list[int]) -> slice | list[int]:
    """An index of pages: a slice, which copies nothing, where they are consecutive."""
    first = pages[0] if pages else 0
    return slice(first, first + len(pages)) if pages == list(range(first, first + len(pages))) else pages


@dataclass(frozen=True)
class PagedKeys:
    """Where the contexts of some requests are, for one pass or for all steps of a block.

    Attributes:
        pages: what the contexts are in; their keys beyond the contexts may be written meanwhile.
        batch: the requests' pages and tokens; its block table is 0 beyond a request's own pages.
    """

    pages: LayerPages
    batch: PagedBatch

    @classmethod
    def of(
        cls,
        pages: LayerPages,
        page_lists: Sequence[list[int]],
        context_lens: Sequence[int],
        query_lens: Sequence[int],
        causal: bool,
        written: Tensor | None = None,
    ) -> PagedKeys:
        """Puts on the device, in one transfer, where the contexts are; `causal` and `written` as in `PagedBatch`."""
        counts = [-(-length // pages.page_size) for length in context_lens]
        width = max(1, *counts)
        rows = [own[:count] + [0] * (width - count) for own, count in zip(page_lists, counts, strict=True)]
        starts = accumulate(query_lens, initial=0)
        numbers = torch.tensor([*context_lens, *starts, *chain(*rows)], dtype=torch.int32)
        num_reqs = len(counts)
        sizes = [num_reqs, num_reqs + 1, num_reqs * width]
        lens, start_loc, table = moved(numbers, pages.keys[0].device).split(sizes)
        table = table.view(num_reqs, width)
        return cls(pages, PagedBatch(table, lens, start_loc, max(query_lens), causal, written))

    @classmethod
    def in_table(
        cls,
        pages: LayerPages,
        block_table: Tensor,
        context_lens: Tensor,
        query_len: int,
        causal: bool,
        written: Tensor | None = None,
    ) -> PagedKeys:
        """Looks at requests that bring equally many tokens each.

        Args:
            pages: what the contexts are in.
            block_table: int32 [num_reqs, max_pages], 0 beyond a request's own pages.
            context_lens: int32 [num_reqs], tokens of context.
            query_len: tokens of the pass per request.
            causal, written: as in `PagedBatch`.
        """
        num_reqs = len(context_lens)
        starts = torch.arange(0, (num_reqs + 1) * query_len, query_len, dtype=torch.int32, device=context_lens.device)
        return cls(pages, PagedBatch(block_table, context_lens, starts, query_len, causal, written))

    def select(self, rows: Tensor) -> PagedKeys:
        """The same for some of the requests, if all bring equally many tokens."""
        batch = replace(
            self.batch,
            block_table=self.batch.block_table[rows],
            context_lens=self.batch.context_lens[rows],
            query_start_loc=self.batch.query_start_loc[: len(rows) + 1],
        )
        return replace(self, batch=batch)

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends to the contexts and to the pass's own keys, which it stores where the batch says.

        `slot` counts attention layers. See `Prefix.attend`.
        """
        attended = paged_attention(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            self.pages.keys[slot],
            self.pages.values[slot],
            self.batch,
        )
        return attended.view_as(query)
