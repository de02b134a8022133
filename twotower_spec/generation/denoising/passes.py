"""Passes of the denoiser over blocks of one size, as CUDA graphs where these were captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from twotower_spec.config import check_integer
from twotower_spec.state.block_context import BlockContext, PooledStates
from twotower_spec.state.graphs import MOST_CAPTURED_TOKENS, PassGraphs, fill_rows, padded_count, padded_counts
from twotower_spec.state.mamba_state import MambaState
from twotower_spec.state.paged_keys import LayerPages, PagedKeys
from twotower_spec.state.transfer import to_device
from twotower_spec.towers import DenoiserTower


@dataclass(frozen=True)
class BlockBuffers:
    """Buffers that captured passes read and write, for the largest of them.

    Attributes:
        layer_slot, mamba, pages: layers, states and pages of the pool that all contexts are in.
        token_ids: int64 [num_reqs, block_size].
        num_masked, slots: int64 [num_reqs].
        context_lens: int32 [num_reqs].
        block_table: int32 [num_reqs, max_pages].
        logits: [num_reqs * block_size, vocab].
    """

    layer_slot: Sequence[int]
    mamba: MambaState
    pages: LayerPages
    token_ids: Tensor
    num_masked: Tensor
    slots: Tensor
    context_lens: Tensor
    block_table: Tensor
    logits: Tensor

    def serve(self, context: BlockContext) -> bool:
        """Whether contexts are in the pool, and no longer than the buffers' pages."""
        states, keys = context.states, context.keys
        return (
            isinstance(states, PooledStates)
            and isinstance(keys, PagedKeys)
            and states.mamba is self.mamba
            and keys.pages is self.pages
            and keys.batch.block_table.shape[1] <= self.block_table.shape[1]
        )

    def fill(self, count: int, token_ids: Tensor, context: BlockContext, num_masked: int | list[int] | Tensor) -> None:
        """Puts a pass into the first rows. Those without a request repeat the first: no more experts are read."""
        states, keys = context.states, context.keys
        assert isinstance(states, PooledStates) and isinstance(keys, PagedKeys)
        if isinstance(num_masked, int):
            self.num_masked[:count] = num_masked
        elif isinstance(num_masked, list):
            fill_rows(self.num_masked, to_device(num_masked, self.num_masked.device), count)
        else:
            fill_rows(self.num_masked, num_masked, count)
        fill_rows(self.token_ids, token_ids, count)
        fill_rows(self.slots, states.slots, count)
        fill_rows(self.context_lens, keys.batch.context_lens, count)
        fill_rows(self.block_table, keys.batch.block_table, count)

    def context(self, count: int) -> BlockContext:
        """Contexts of the first rows."""
        table, lens, size = self.block_table[:count], self.context_lens[:count], self.token_ids.shape[1]
        return BlockContext(
            self.layer_slot,
            PooledStates(self.mamba, self.slots[:count]),
            PagedKeys.in_table(self.pages, table, lens, size, causal=False),
        )


class DenoiserPasses:
    """Passes of a denoiser over blocks of one size.

    Attributes:
        denoiser: the tower.
        block_size: positions of a block.
    """

    def __init__(self, denoiser: DenoiserTower, block_size: int, graphs: PassGraphs | None = None) -> None:
        """Computes the time modulation for every number of masked positions once.

        Args:
            denoiser: the tower.
            block_size: positions of a block.
            graphs: where passes are captured; None for a place of their own.

        Raises:
            ArgumentError: the block size is out of range.
        """
        check_integer("block_size", block_size, minimum=1)
        self.denoiser, self.block_size = denoiser, block_size
        self._graphs = graphs or PassGraphs(denoiser.device)
        self._buffers: BlockBuffers | None = None
        with torch.inference_mode():
            # [block_size + 1, num_layers, 3, hidden]
            self._modulation = denoiser.time_conditioning.for_block_size(block_size)

    @property
    def nbytes(self) -> int:
        """Bytes of time modulation, on the denoiser's device."""
        return self._modulation.nbytes

    def __call__(
        self, token_ids: Tensor, context: BlockContext, num_masked: int | list[int] | Tensor, positions: Tensor | None
    ) -> Tensor:
        """Logits of a pass, in the tower's dtype.

        Args:
            token_ids: int64 [num_reqs, block_size].
            context: of the rows.
            num_masked: masked positions, of every row alike or of each.
            positions: int64 [num_positions], flat indices of the logits that are wanted; None for all.

        Returns:
            [num_positions, vocab]. The next captured pass may overwrite them.
        """
        count, buffers = padded_count(len(token_ids)), self._buffers
        if buffers is not None and self._key(count) in self._graphs and buffers.serve(context):
            buffers.fill(count, token_ids, context, num_masked)
            self._graphs.replay(self._key(count))
            logits = buffers.logits[: token_ids.numel()]
            return logits if positions is None else logits[positions]
        modulation = self._modulation_of(num_masked)
        computed: Tensor = self.denoiser(token_ids, context, modulation, positions, wide_logits=False)
        return computed

    @torch.inference_mode()
    def capture(self, context: BlockContext, most_reqs: int, max_pages: int) -> None:
        """Captures passes of up to so many requests, once and where there are graphs.

        Args:
            context: of any requests, viewed for blocks of this size, in the pool where all contexts are.
            most_reqs: that a pass is going to have.
            max_pages: of the longest context of a request.
        """
        most = min(padded_count(most_reqs), MOST_CAPTURED_TOKENS // self.block_size)
        graphs, size, states, keys = self._graphs, self.block_size, context.states, context.keys
        if self._buffers is not None or not graphs.available or most < 1:
            return
        if not isinstance(states, PooledStates) or not isinstance(keys, PagedKeys):
            return
        buffers = BlockBuffers(
            layer_slot=context.layer_slot,
            mamba=states.mamba,
            pages=keys.pages,
            token_ids=graphs.buffer(most, size, dtype=torch.int64),
            num_masked=graphs.buffer(most, dtype=torch.int64),
            slots=graphs.buffer(most, dtype=torch.int64),
            context_lens=graphs.buffer(most, dtype=torch.int32),
            block_table=graphs.buffer(most, max_pages, dtype=torch.int32),
            logits=graphs.logits_room(most * size, self.denoiser.head.shape[0], self.denoiser.dtype),
        )
        for count in padded_counts(most):
            graphs.capture(self._key(count), partial(self._run, buffers, count))
        self._buffers = buffers

    def _key(self, count: int) -> tuple[str, int, int]:
        return "denoiser", self.block_size, count

    def _run(self, buffers: BlockBuffers, count: int) -> None:
        """The pass that is captured, over the first rows of the buffers."""
        modulation = self._modulation[buffers.num_masked[:count]]
        logits = self.denoiser(buffers.token_ids[:count], buffers.context(count), modulation, wide_logits=False)
        buffers.logits[: count * self.block_size] = logits

    def _modulation_of(self, num_masked: int | list[int] | Tensor) -> Tensor:
        """Time modulation of rows by their masked positions, one row where all have as many."""
        if isinstance(num_masked, list):
            if min(num_masked) < max(num_masked):
                return self._modulation[to_device(num_masked, self._modulation.device)]
            num_masked = num_masked[0]
        return (
            self._modulation[num_masked : num_masked + 1]
            if isinstance(num_masked, int)
            else self._modulation[num_masked]
        )
