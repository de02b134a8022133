"""Context passes of fixed shape: how far requests have come, and how far they come, is known to the device alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower_kernels.block_scan import ScanWeights
from twotower_spec.state.block_context import BlockContext, paged_keys_for_block, states_for_block
from twotower_spec.state.context_state import ContextState
from twotower_spec.state.kv_cache import PagedKVCache
from twotower_spec.state.mamba_state import MambaState
from twotower_spec.state.paged_keys import PagedKeys
from twotower_spec.state.transfer import to_device
from twotower_spec.towers import ContextTower


@dataclass(frozen=True)
class TokenTable:
    """Token ids of requests where their owner keeps them, on the device of the context tower.

    Attributes:
        token_ids: integers [num_rows, max_tokens], a request's from the left.
        lengths: integers [num_rows], tokens of each row.
    """

    token_ids: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class WindowRows:
    """Requests of one pass.

    Attributes:
        slots: int64 [num_reqs] on the device, of the pool.
        rows: int64 [num_reqs] on the device, of the token table.
        block_table: int32 [num_reqs, max_pages] on the device, 0 beyond a request's own pages.
        page_lists: pages of every request.
    """

    slots: Tensor
    rows: Tensor
    block_table: Tensor
    page_lists: list[list[int]]


class ContextWindows:
    """Reads requests of a pool on, each by up to `width` tokens in a pass, without a look at the device.

    Shapes depend on the number of requests and their pages alone. What a request lacks of a whole window is inert: time
    step 0, keys into the pool's scratch page.

    Attributes:
        width: tokens of a pass per request.
        lengths: int64 [num_slots] on the device, tokens whose state is held.
    """

    def __init__(self, state: ContextState, width: int) -> None:
        """Looks after a pool that has a scratch page."""
        self.state, self.width = state, width
        self.lengths = torch.zeros(state.num_slots, dtype=torch.int64, device=state.mamba.conv.device)

    @property
    def device(self) -> torch.device:
        """The context tower's."""
        return self.lengths.device

    def take_over(self, request_ids: Sequence[Hashable]) -> None:
        """Goes on from where passes of `ContextState` have brought some requests."""
        entries = [self.state.entry(request_id) for request_id in request_ids]
        known = to_device(np.array([(entry.slot, len(entry.history)) for entry in entries]).T.copy(), self.device)
        self.lengths[known[0]] = known[1]

    def rows(self, request_ids: Sequence[Hashable], table_rows: Sequence[int]) -> WindowRows:
        """Looks at requests that are held and have pages for what they may read; `table_rows` are theirs."""
        entries = [self.state.entry(request_id) for request_id in request_ids]
        width = max(1, *(len(entry.pages) for entry in entries))
        numbers = np.zeros((len(entries), 2 + width), dtype=np.int64)
        for row, entry, table_row in zip(numbers, entries, table_rows, strict=True):
            row[:2] = entry.slot, table_row
            row[2 : 2 + len(entry.pages)] = entry.pages
        found = to_device(numbers, self.device)
        return WindowRows(
            found[:, 0].contiguous(), found[:, 1].contiguous(), found[:, 2:].int(), [entry.pages for entry in entries]
        )

    @torch.inference_mode()
    def extend(self, tower: ContextTower, rows: WindowRows, table: TokenTable) -> tuple[Tensor, Tensor]:
        """Runs the context tower over the next tokens of some requests.

        Args:
            tower: on the device of the pool.
            rows: the requests.
            table: all of their tokens.

        Returns:
            Logits [num_reqs, vocab] after the last token that is held; and int64 [num_reqs], tokens that were read, 0
            where there was none, whose logits are of no use.
        """
        num_reqs, width, cache = len(rows.slots), self.width, self.state.kv_cache
        before, wanted = self.lengths[rows.slots], table.lengths[rows.rows].long()
        num_new = (wanted - before).clamp(0, width)
        offsets = torch.arange(width, device=self.device)
        counts = offsets < num_new[:, None]
        places = before[:, None] + offsets
        # What is beyond the window repeats its last token, so that no experts are visited for it alone.
        last = (before + num_new - 1).clamp(min=0)
        token_ids = table.token_ids[rows.rows[:, None], torch.minimum(places, last[:, None])].long()
        page = rows.block_table.gather(1, (places // cache.page_size).clamp(max=rows.block_table.shape[1] - 1))
        written = torch.where(counts, page * cache.page_size + places % cache.page_size, cache.scratch_token)
        keys = PagedKeys.in_table(cache.pages, rows.block_table, before.int(), width, causal=True)
        step = WindowPass(self.state.layer_slot, self.state.mamba, cache, rows.slots, num_new, written.flatten(), keys)
        first = torch.arange(0, num_reqs * width, width, device=self.device)
        # Ids that the tower does not have: whoever draws up the table is told by its host, later.
        token_ids = token_ids.clamp(0, tower.embeddings.shape[0] - 1)
        logits: Tensor = tower(token_ids, step, positions=first + (num_new - 1).clamp(min=0))
        self.lengths[rows.slots] = before + num_new
        return logits, num_new

    @torch.inference_mode()
    def view(self, rows: WindowRows, block_size: int) -> BlockContext:
        """Gives the state of some requests as a denoiser reads it; see `ContextSource.view`."""
        state = self.state
        return BlockContext(
            layer_slot=state.layer_slot,
            states=states_for_block(state.mamba, rows.slots, state.denoiser_device, state.denoiser_dtype),
            keys=paged_keys_for_block(
                state.kv_cache.pages,
                rows.block_table,
                rows.page_lists,
                self.lengths[rows.slots].int(),
                block_size,
                state.workspace(block_size),
            ),
        )


@dataclass
class WindowPass:
    """The `Prefix` of a context pass over windows, [num_reqs, width, ...].

    Attributes:
        slots: int64 [num_reqs], of the Mamba states.
        num_new: int64 [num_reqs], tokens that count.
        written: int64 [num_reqs * width], where each token's key goes.
        keys: of the contexts before the pass.
    """

    layer_slot: Sequence[int]
    mamba: MambaState
    kv_cache: PagedKVCache
    slots: Tensor
    num_new: Tensor
    written: Tensor
    keys: PagedKeys

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over the new tokens and advances its state; see `Prefix.scan`."""
        return self.mamba.scan(self.layer_slot[layer], self.slots, u, delta, weights, self.num_new)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Appends the new keys and attends causally; see `Prefix.attend`."""
        slot = self.layer_slot[layer]
        self.kv_cache.write(slot, self.written, key.flatten(0, 1), value.flatten(0, 1))
        return self.keys.attend(slot, query, key, value)
