"""Context state as the denoiser reads it: fixed for a whole block, on the denoiser's device."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from twotower_spec.state.mamba_state import MambaState, Slots
from twotower_spec.state.paged_keys import LayerPages, PagedKeys
from twotower_spec.state.transfer import to_device


class BlockWorkspace:
    """Room for keys and values on the denoiser's side, for one `BlockContext` at a time.

    It takes memory when it is first written: where the pool's pages can be read in place, never.

    Attributes:
        num_tokens: tokens there is room for.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        num_layers: int | None = None,
    ) -> None:
        """Room for `num_tokens` tokens, those of the blocks included, in all attention layers or `num_layers`."""
        self.num_tokens, self.dtype, self.device = num_tokens, dtype, device
        num_layers = len(config.attention_layers) if num_layers is None else num_layers
        self._shape = (num_layers, num_tokens, config.num_key_value_heads, config.head_dim)

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
    pages: LayerPages,
    page_lists: Sequence[list[int]],
    context_lens: Sequence[int],
    block_size: int,
    workspace: BlockWorkspace,
) -> BlockKeys:
    """Chooses how blocks read contexts.

    By the kernel where the contexts are, if it can; by the kernel in a copy of the pages where the denoiser has
    another device or dtype; else by PyTorch in a copy that views can be taken of.

    Args:
        pages: what the contexts are in.
        page_lists: pages of every request.
        context_lens: tokens of every request.
        block_size: tokens of a block.
        workspace: on the denoiser's device and of its dtype.
    """
    query_lens = [block_size] * len(page_lists)
    if all(map(reads_pages, pages.keys)) and pages.are_on(workspace.device, workspace.dtype):
        return PagedKeys.of(pages, page_lists, context_lens, query_lens, causal=False)
    if pages.keys and reads_pages(workspace.keys):
        copied, lists = _copy_pages(pages, page_lists, context_lens, workspace)
        return PagedKeys.of(copied, lists, context_lens, query_lens, causal=False)
    starts = [0, *accumulate(length + block_size for length in context_lens)]
    for own, start, stop in zip(page_lists, starts, starts[1:], strict=False):
        tokens = slice(start + block_size, stop)
        pages.copy_tokens(own, workspace.keys[:, tokens].unbind(), workspace.values[:, tokens].unbind())
    return CopiedKeys(workspace, starts[:-1], context_lens, block_size)


def _copy_pages(
    pages: LayerPages, page_lists: Sequence[list[int]], context_lens: Sequence[int], workspace: BlockWorkspace
) -> tuple[LayerPages, list[list[int]]]:
    """Copies the pages that hold contexts to the front of the workspace; gives where those of each request are."""
    counts = [-(-length // pages.page_size) for length in context_lens]
    copied = LayerPages.of(workspace.keys, workspace.values, pages.page_size)
    needed = [page for own, count in zip(page_lists, counts, strict=True) for page in own[:count]]
    pages.copy_pages(needed, copied.keys, copied.values)
    return copied, [list(range(end - count, end)) for end, count in zip(accumulate(counts), counts, strict=True)]


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
        first = to_device(starts, device)[:, None]
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


class BlockStates(ABC):
    """Mamba states at the end of the contexts of some requests, never written."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The denoiser's."""

    @abstractmethod
    def read(self, slot: int) -> tuple[Tensor, Tensor]:
        """Convolution history [num_reqs, taps - 1, channels] and SSM state; `slot` counts Mamba layers."""

    @abstractmethod
    def select(self, rows: Tensor) -> BlockStates:
        """The same for some of the requests, in the given order."""

    def scan(self, slot: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over blocks; `slot` counts Mamba layers. See `Prefix.scan`."""
        return block_scan(u, delta, *self.read(slot), weights, return_state=False)[0]


@dataclass(frozen=True)
class StackedStates(BlockStates):
    """States of all layers in one tensor: `conv` and `ssm` are [num_mamba_layers, num_reqs, ...]."""

    conv: Tensor
    ssm: Tensor

    @property
    def device(self) -> torch.device:
        """See `BlockStates`."""
        return self.conv.device

    def read(self, slot: int) -> tuple[Tensor, Tensor]:
        """See `BlockStates.read`."""
        return self.conv[slot], self.ssm[slot]

    def select(self, rows: Tensor) -> StackedStates:
        """See `BlockStates.select`."""
        return StackedStates(self.conv[:, rows], self.ssm[:, rows])


@dataclass(frozen=True)
class PooledStates(BlockStates):
    """States that are read where the pool has them, so that no copy of all layers is made.

    Attributes:
        mamba: the pool.
        slots: int64 [num_reqs], of the requests.
    """

    mamba: MambaState
    slots: Tensor

    @property
    def device(self) -> torch.device:
        """See `BlockStates`."""
        return self.mamba.conv.device

    def read(self, slot: int) -> tuple[Tensor, Tensor]:
        """See `BlockStates.read`."""
        return self.mamba.conv[slot, self.slots], self.mamba.ssm[slot, self.slots]

    def select(self, rows: Tensor) -> PooledStates:
        """See `BlockStates.select`."""
        return PooledStates(self.mamba, self.slots[rows])

    def scan(self, slot: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """See `BlockStates.scan`."""
        return self.mamba.scan(slot, self.slots, u, delta, weights)


def states_for_block(mamba: MambaState, slots: Slots) -> BlockStates:
    """Has blocks read states where they are."""
    if isinstance(slots, Tensor):
        return PooledStates(mamba, slots)
    return StackedStates(mamba.conv[:, slots], mamba.ssm[:, slots])


@dataclass
class BlockContext:
    """Read-only context state of some requests.

    Attributes:
        layer_slot: index of each layer among the layers of its kind.
        states: of the Mamba layers.
        keys: of the attention layers.
    """

    layer_slot: Sequence[int]
    states: BlockStates
    keys: BlockKeys

    def select(self, rows: list[int]) -> BlockContext:
        """The same for some of the rows, in the given order."""
        index = to_device(rows, self.states.device)
        return BlockContext(self.layer_slot, self.states.select(index), self.keys.select(index))

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over the block from the context's state; see `Prefix.scan`."""
        return self.states.scan(self.layer_slot[layer], u, delta, weights)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends to context and block without any mask inside the block; see `Prefix.attend`."""
        return self.keys.attend(self.layer_slot[layer], query, key, value)
