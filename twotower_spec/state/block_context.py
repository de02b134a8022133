"""Context state as the denoiser reads it: fixed for a whole block, on the denoiser's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from twotower_kernels.block_attention import attention, ragged_attention, reads_pages
from twotower_kernels.block_scan import ScanWeights, block_scan
from twotower_spec.config import TwoTowerConfig
from twotower_spec.state.kv_cache import PagedKVCache
from twotower_spec.state.paged_keys import PagedKeys


class BlockWorkspace:
    """Room for keys and values on the denoiser's side, for one `BlockContext` at a time.

    It takes memory when it is first written: where the pool's pages can be read in place, never.

    Attributes:
        num_tokens: tokens there is room for.
    """

    def __init__(self, config: TwoTowerConfig, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for `num_tokens` tokens, those of the blocks included."""
        self.num_tokens, self.dtype, self.device = num_tokens, dtype, device
        self._shape = (len(config.attention_layers), num_tokens, config.num_key_value_heads, config.head_dim)

    @cached_property
    def keys(self) -> Tensor:
        """[num_attention_layers, num_tokens, kv_heads, head_dim]."""
        return torch.empty(self._shape, dtype=self.dtype, device=self.device)

    @cached_property
    def values(self) -> Tensor:
        """Values, shaped like `keys`."""
        return torch.empty(self._shape, dtype=self.dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors, as far as they exist."""
        return sum(vars(self)[name].nbytes for name in ("keys", "values") if name in vars(self))


class BlockKeys(Protocol):
    """Keys that the tokens of a block attend to: the context of their request and themselves, without any mask."""

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends as `Prefix.attend` does; `slot` counts attention layers."""
        ...

    def select(self, rows: Tensor) -> BlockKeys:
        """The same for some of the requests, in the given order."""
        ...


def keys_for_block(
    cache: PagedKVCache,
    page_lists: Sequence[list[int]],
    context_lens: Sequence[int],
    block_size: int,
    workspace: BlockWorkspace,
) -> BlockKeys:
    """Chooses how blocks read contexts.

    By the kernel in the pool's own pages where it can; by the kernel in a copy of the pages where the denoiser has
    another device or dtype; else by PyTorch in a copy that views can be taken of.

    Args:
        cache: of the pool.
        page_lists: pages of every request.
        context_lens: tokens of every request.
        block_size: tokens of a block.
        workspace: on the denoiser's device and of its dtype.
    """
    query_lens = [block_size] * len(page_lists)
    if reads_pages(cache.keys) and (workspace.device, workspace.dtype) == (cache.keys.device, cache.keys.dtype):
        return PagedKeys.of(cache, cache.page_size, page_lists, context_lens, query_lens, causal=False)
    if reads_pages(workspace.keys):
        copied = _copy_pages(cache, page_lists, context_lens, workspace)
        return PagedKeys.of(workspace, cache.page_size, copied, context_lens, query_lens, causal=False)
    starts = [0, *accumulate(length + block_size for length in context_lens)]
    for pages, length, start, stop in zip(page_lists, context_lens, starts, starts[1:], strict=False):
        span = cache.span([pages], length)
        workspace.keys[:, start + block_size : stop] = span.take(cache.keys)[:, 0]
        workspace.values[:, start + block_size : stop] = span.take(cache.values)[:, 0]
    return CopiedKeys(workspace, starts[:-1], context_lens, block_size)


def _copy_pages(
    cache: PagedKVCache, page_lists: Sequence[list[int]], context_lens: Sequence[int], workspace: BlockWorkspace
) -> list[list[int]]:
    """Copies the pages that hold contexts to the front of the workspace; gives where those of each request are."""
    needed = [pages[: cache.pages_for(length)] for pages, length in zip(page_lists, context_lens, strict=True)]
    index = torch.tensor([page for pages in needed for page in pages], dtype=torch.long, device=cache.keys.device)
    for source, target in ((cache.keys, workspace.keys), (cache.values, workspace.values)):
        pages_of = source.unflatten(1, (-1, cache.page_size))
        target[:, : len(index) * cache.page_size].copy_(pages_of[:, index].flatten(1, 2))
    ends = accumulate(len(pages) for pages in needed)
    return [list(range(end - len(pages), end)) for end, pages in zip(ends, needed, strict=True)]


class CopiedKeys:
    """`BlockKeys` for PyTorch: contexts in a workspace, each behind room for its block, so that one view has both.

    One workspace serves every step: attention without positions does not mind that the block stands in front.
    """

    def __init__(
        self, workspace: BlockWorkspace, starts: Sequence[int], context_lens: Sequence[int], block_size: int
    ) -> None:
        """Looks at a workspace that holds the contexts already.

        Args:
            workspace: per request `block_size` tokens, overwritten by every step, then its context.
            starts: index of each request's first token in the workspace.
            context_lens: tokens of context per request.
            block_size: tokens of the block.
        """
        self._workspace, self._starts, self._context_lens = workspace, starts, context_lens
        self._block_size = block_size
        device = workspace.device
        first = torch.tensor(starts, device=device)[:, None]
        self._block_index = (first + torch.arange(block_size, device=device)).flatten()
        num_keys = context_lens[0] + block_size
        self._alike = all(length == context_lens[0] for length in context_lens) and all(
            start == starts[0] + row * num_keys for row, start in enumerate(starts)
        )
        stored = (workspace.keys, workspace.values)
        if self._alike:
            stop = starts[0] + len(starts) * num_keys
            self._together = [t[:, starts[0] : stop].unflatten(1, (-1, num_keys)) for t in stored]
        else:
            self._rows = [[self._row(t, row) for row in range(len(starts))] for t in stored]

    def _row(self, stored: Tensor, row: int) -> tuple[Tensor, ...]:
        """Keys or values of one request, per layer [1, kv_heads, num_keys, head_dim]."""
        start = self._starts[row]
        return stored[:, None, start : start + self._block_size + self._context_lens[row]].transpose(2, 3).unbind()

    def select(self, rows: Tensor) -> CopiedKeys:
        """The same for some of the requests, in the given order."""
        chosen = rows.tolist()
        starts, lens = [self._starts[row] for row in chosen], [self._context_lens[row] for row in chosen]
        return CopiedKeys(self._workspace, starts, lens, self._block_size)

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Writes the block's keys in front of its context's and attends to all of them."""
        self._workspace.keys[slot].index_copy_(0, self._block_index, key.flatten(0, 1))
        self._workspace.values[slot].index_copy_(0, self._block_index, value.flatten(0, 1))
        if self._alike:
            keys, values = self._together
            return attention(query, keys[slot], values[slot])
        keys_of, values_of = ([row[slot] for row in rows] for rows in self._rows)
        out = ragged_attention(query.flatten(0, 1), keys_of, values_of, [self._block_size] * len(self._starts))
        return out.view_as(query)


@dataclass
class BlockContext:
    """Read-only context state of some requests.

    Attributes:
        layer_slot: index of each layer among the layers of its kind.
        conv, ssm: Mamba states [num_mamba_layers, num_reqs, ...], never written.
        keys: of the contexts.
    """

    layer_slot: Sequence[int]
    conv: Tensor
    ssm: Tensor
    keys: BlockKeys

    def select(self, rows: list[int]) -> BlockContext:
        """The same for some of the rows, in the given order."""
        index = torch.tensor(rows, device=self.conv.device)
        return BlockContext(
            layer_slot=self.layer_slot,
            conv=self.conv[:, index],
            ssm=self.ssm[:, index],
            keys=self.keys.select(index),
        )

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over the block from the context's state; see `Prefix.scan`."""
        slot = self.layer_slot[layer]
        return block_scan(u, delta, self.conv[slot], self.ssm[slot], weights, return_state=False)[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends to context and block without any mask inside the block; see `Prefix.attend`."""
        return self.keys.attend(self.layer_slot[layer], query, key, value)
