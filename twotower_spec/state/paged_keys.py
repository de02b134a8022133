"""Keys and values that a kernel reads where they lie in pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Protocol

import torch
from torch import Tensor

from twotower_kernels.block_attention import paged_attention


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
        page_size: tokens of a page.
        block_table: int32 [num_reqs, most pages of a context], 0 beyond a request's own.
        context_lens: int32 [num_reqs].
        query_start_loc: int32 [num_reqs + 1], first token of each request in the pass, leading 0 included.
        max_query_len: most tokens that a request brings.
        causal: whether a token of the pass sees only itself and what is before it.
    """

    room: Pages
    page_size: int
    block_table: Tensor
    context_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    causal: bool

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
        return cls(room, page_size, table.view(num_reqs, width), lens, start_loc, max(query_lens), causal)

    def select(self, rows: Tensor) -> PagedKeys:
        """The same for some of the requests, if all bring equally many tokens."""
        return replace(
            self,
            block_table=self.block_table[rows],
            context_lens=self.context_lens[rows],
            query_start_loc=self.query_start_loc[: len(rows) + 1],
        )

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends to the contexts and to the pass's own keys; `slot` counts attention layers. See `Prefix.attend`."""
        attended = paged_attention(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            self.room.keys[slot],
            self.room.values[slot],
            self.block_table,
            self.context_lens,
            self.query_start_loc,
            self.page_size,
            self.max_query_len,
            self.causal,
        )
        return attended.view_as(query)
