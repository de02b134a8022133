"""Keys and values that a kernel reads where they lie in pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Protocol

import torch
from torch import Tensor

from twotower_kernels.block_attention import PagedBatch, paged_attention


class Pages(Protocol):
    """Room for keys and values of all attention layers, [num_attention_layers, num_tokens, kv_heads, head_dim]."""

    @property
    def keys(self) -> Tensor: ...

    @property
    def values(self) -> Tensor: ...


@dataclass(frozen=True)
class PagedKeys:
    """Where the contexts of some requests are, for one pass or for all steps of a block.

    Attributes:
        room: what the pages are in; its keys beyond the contexts may be written meanwhile.
        batch: the requests' pages and tokens; its block table is 0 beyond a request's own pages.
    """

    room: Pages
    batch: PagedBatch

    @classmethod
    def of(
        cls,
        room: Pages,
        page_size: int,
        page_lists: Sequence[list[int]],
        context_lens: Sequence[int],
        query_lens: Sequence[int],
        causal: bool,
    ) -> PagedKeys:
        """Puts on the device, in one transfer, where the contexts are."""
        counts = [-(-length // page_size) for length in context_lens]
        width = max(1, *counts)
        rows = [pages[:count] + [0] * (width - count) for pages, count in zip(page_lists, counts, strict=True)]
        starts = accumulate(query_lens, initial=0)
        numbers = torch.tensor([*context_lens, *starts, *chain(*rows)], dtype=torch.int32)
        num_reqs = len(counts)
        sizes = [num_reqs, num_reqs + 1, num_reqs * width]
        lens, start_loc, table = numbers.to(room.keys.device, non_blocking=True).split(sizes)
        table = table.view(num_reqs, width)
        return cls(room, PagedBatch(table, lens, start_loc, page_size, max(query_lens), causal))

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
        """Attends to the contexts and to the pass's own keys; `slot` counts attention layers. See `Prefix.attend`."""
        attended = paged_attention(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            self.room.keys[slot],
            self.room.values[slot],
            self.batch,
        )
        return attended.view_as(query)
