"""Arguments of attention over pages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """Requests of one pass: which tokens are theirs, and which pages of a cache hold their contexts.

    Attributes:
        block_table: int32 [num_reqs, max_pages], pages of each request in the order of its tokens; anything after them.
        context_lens: int32 [num_reqs], tokens of context, at most as many as max_pages pages have.
        query_start_loc: int32 [num_reqs + 1], first token of each request in the pass, leading 0 included.
        max_query_len: most tokens that a request has in the pass, or more.
        causal: a query sees its own and earlier keys of the pass; otherwise all of its request's.
        written: int64 [num_tokens], index in the cache, page by page, at which each token's key and value are stored,
            beyond all contexts of the pass; None stores nothing.
    """

    block_table: Tensor
    context_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    causal: bool
    written: Tensor | None = None
