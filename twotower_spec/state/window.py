"""Context passes of fixed shape: how far requests have come, and how far they come, is known to the device alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower_kernels.block_scan import ScanWeights
from twotower_spec.config import accumulation_dtype
from twotower_spec.state.block_context import BlockContext, states_for_block
from twotower_spec.state.context_state import ContextState, RequestId
from twotower_spec.state.graphs import MOST_CAPTURED_TOKENS, PassGraphs, fill_rows, padded_count, padded_counts
from twotower_spec.state.mamba_state import MambaAdvance
from twotower_spec.state.paged_keys import PagedKeys
from twotower_spec.state.transfer import moved, to_device
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
        slots_and_pages: slots and block table on the host, integers [num_reqs, 1 + max_pages].
    """

    slots: Tensor
    rows: Tensor
    block_table: Tensor
    slots_and_pages: npt.NDArray[np.int64]

    @property
    def slot_list(self) -> list[int]:
        """Slots on the host."""
        slots: list[int] = self.slots_and_pages[:, 0].tolist()
        return slots


@dataclass(frozen=True)
class WindowInputs:
    """Tensors that a pass looks at, on the device.

    Attributes:
        slots: int64 [num_reqs], of the pool.
        before: int64 [num_reqs], tokens whose state is held.
        num_new: int64 [num_reqs], tokens that count.
        token_ids: int64 [num_reqs, width].
        block_table: int32 [num_reqs, max_pages], 0 beyond a request's own pages.
    """

    slots: Tensor
    before: Tensor
    num_new: Tensor
    token_ids: Tensor
    block_table: Tensor

    def first(self, count: int) -> WindowInputs:
        """Those of the first rows: views."""
        return WindowInputs(*(x[:count] for x in vars(self).values()))

    def hold(self, inputs: WindowInputs) -> bool:
        """Whether these buffers have as many pages per request."""
        return inputs.block_table.shape[1] <= self.block_table.shape[1]

    def fill(self, inputs: WindowInputs, count: int, scratch_slot: int) -> None:
        """Takes over those of a pass; rows up to `count` without a request bring no tokens to the scratch slot."""
        fill_rows(self.slots, inputs.slots, count, scratch_slot)
        fill_rows(self.before, inputs.before, count, 0)
        fill_rows(self.num_new, inputs.num_new, count, 0)
        fill_rows(self.token_ids, inputs.token_ids, count)
        fill_rows(self.block_table, inputs.block_table, count)


class ContextWindows:
    """Reads requests of a pool on, each by up to `width` tokens in a pass, without a look at the device.

    Shapes depend on the number of requests and their pages alone. What a request lacks of a whole window is inert: time
    step 0, keys into the pool's scratch page. Where passes were captured, rows without a request use its scratch slot.

    Attributes:
        width: tokens of a pass per request.
        lengths: int64 [num_slots] on the device, tokens whose state is held.
    """

    def __init__(self, state: ContextState, width: int, graphs: PassGraphs | None = None) -> None:
        """Looks after a pool that has a scratch slot and page.

        Args:
            state: the pool.
            width: tokens of a pass per request.
            graphs: where passes are captured; None for a place of their own.
        """
        self.state, self.width = state, width
        self.lengths = torch.zeros(state.num_slots, dtype=torch.int64, device=state.mamba.conv.device)
        self._graphs = graphs or PassGraphs(self.lengths.device)
        self._buffers: WindowInputs | None = None
        self._logits: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The context tower's."""
        return self.lengths.device

    def take_over(self, request_ids: Sequence[RequestId]) -> None:
        """Goes on from where passes of `ContextState` have brought some requests."""
        entries = [self.state.entry(request_id) for request_id in request_ids]
        known = to_device(np.array([(entry.slot, len(entry.history)) for entry in entries]).T.copy(), self.device)
        self.lengths[known[0]] = known[1]

    def rows(self, request_ids: Sequence[RequestId], table_rows: Sequence[int]) -> WindowRows:
        """Looks at requests that are held and have pages for what they may read; `table_rows` are theirs."""
        entries = [self.state.entry(request_id) for request_id in request_ids]
        width = max(1, *(len(entry.pages) for entry in entries))
        numbers = np.zeros((len(entries), 2 + width), dtype=np.int64)
        for row, entry, table_row in zip(numbers, entries, table_rows, strict=True):
            row[:2] = table_row, entry.slot
            row[2 : 2 + len(entry.pages)] = entry.pages
        found = to_device(numbers, self.device)
        return WindowRows(found[:, 1].contiguous(), found[:, 0].contiguous(), found[:, 2:].int(), numbers[:, 1:])

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
        before, wanted = self.lengths[rows.slots], table.lengths[rows.rows].long()
        num_new = (wanted - before).clamp(0, self.width)
        # What is beyond the window repeats its last token, so that no experts are visited for it alone.
        last = (before + num_new - 1).clamp(min=0)
        places = torch.minimum(before[:, None] + torch.arange(self.width, device=self.device), last[:, None])
        # Ids that the tower does not have: whoever draws up the table is told by its host, later.
        token_ids = table.token_ids[rows.rows[:, None], places].long().clamp(0, tower.embeddings.shape[0] - 1)
        inputs = WindowInputs(rows.slots, before, num_new, token_ids, rows.block_table)
        logits = self._read(tower, inputs, rows.slot_list)
        self.lengths[rows.slots] = before + num_new
        return logits, num_new

    def serve(self, increments: Mapping[RequestId, Sequence[int]]) -> bool:
        """Whether passes over so many new tokens were captured."""
        fits = all(0 < len(tokens) <= self.width for tokens in increments.values())
        return fits and self._key(padded_count(len(increments))) in self._graphs

    @torch.inference_mode()
    def extend_known(self, tower: ContextTower, increments: Mapping[RequestId, Sequence[int]]) -> Tensor:
        """Runs the context tower over new tokens that the host knows; see `ContextState.extend`.

        Args:
            tower: on the device of the pool.
            increments: one to `width` new tokens per request; requests that are not held are claimed.

        Returns:
            Logits [num_reqs, vocab] after the last tokens, which the next pass may overwrite.
        """
        state, ids = self.state, list(increments)
        for request_id, tokens in increments.items():
            state.claim(request_id, state.num_computed_tokens(request_id) + len(tokens), keep=ids)
        entries = [state.entry(request_id) for request_id in ids]
        first, most_pages = 3 + self.width, max(1, *(len(entry.pages) for entry in entries))
        numbers = np.zeros((len(ids), first + most_pages), dtype=np.int64)
        for row, entry, tokens in zip(numbers, entries, increments.values(), strict=True):
            row[:3] = entry.slot, len(entry.history), len(tokens)
            row[3:first] = tokens[-1]  # what is beyond the new tokens visits no other experts
            row[3 : 3 + len(tokens)] = tokens
            row[first : first + len(entry.pages)] = entry.pages
        found = to_device(numbers, self.device)
        slots, before, num_new = (column.contiguous() for column in found[:, :3].unbind(1))
        inputs = WindowInputs(slots, before, num_new, found[:, 3:first].contiguous(), found[:, first:].int())
        logits = self._read(tower, inputs, [entry.slot for entry in entries])
        for entry, tokens in zip(entries, increments.values(), strict=True):
            entry.history.extend(tokens)
        return logits

    @torch.inference_mode()
    def capture(self, tower: ContextTower, max_pages: int) -> None:
        """Captures passes of all numbers of requests, once, where there are graphs.

        Args:
            tower: on the device of the pool.
            max_pages: of the longest context of a request.
        """
        graphs, most = self._graphs, min(padded_count(self.state.num_slots), MOST_CAPTURED_TOKENS // self.width)
        if self._buffers is not None or not graphs.available or most < 1:
            return
        buffers = WindowInputs(
            slots=graphs.buffer(most, dtype=torch.int64).fill_(self.state.num_slots),  # the scratch slot
            before=graphs.buffer(most, dtype=torch.int64),
            num_new=graphs.buffer(most, dtype=torch.int64),
            token_ids=graphs.buffer(most, self.width, dtype=torch.int64),
            block_table=graphs.buffer(most, max_pages, dtype=torch.int32),
        )
        logits = graphs.logits_room(most, tower.head.shape[0], accumulation_dtype(tower.dtype))

        def run(count: int) -> None:
            logits[:count] = self._run(tower, buffers.first(count))

        for count in padded_counts(most):
            graphs.capture(self._key(count), partial(run, count))
        self._buffers, self._logits = buffers, logits

    def _key(self, count: int) -> tuple[str, int, int]:
        return "context", self.width, count

    def _read(self, tower: ContextTower, inputs: WindowInputs, slots: Sequence[int]) -> Tensor:
        """Runs a pass, captured or not; logits [num_reqs, vocab] behind the last tokens that count."""
        num_reqs = len(slots)
        if self.state.has_mirror:
            self.state.note_writes(self._written(inputs), slots)
        key, buffers = self._key(padded_count(num_reqs)), self._buffers
        captured = key in self._graphs and buffers is not None and buffers.hold(inputs)
        if buffers is None or self._logits is None or not captured:
            return self._run(tower, inputs)
        buffers.fill(inputs, key[-1], self.state.num_slots)
        self._graphs.replay(key)
        return self._logits[:num_reqs]

    def _run(self, tower: ContextTower, inputs: WindowInputs) -> Tensor:
        """The pass itself, which looks at nothing but its inputs and the pool."""
        cache, num_new, before, written = self.state.kv_cache, inputs.num_new, inputs.before, self._written(inputs)
        keys = PagedKeys.in_table(cache.pages, inputs.block_table, before.int(), self.width, True, written)
        states = MambaAdvance(self.state.mamba, inputs.slots, len(num_new))
        step = WindowPass(self.state.layer_slot, states, num_new, keys)
        first = torch.arange(0, len(num_new) * self.width, self.width, device=self.device)
        logits: Tensor = tower(inputs.token_ids, step, positions=first + (num_new - 1).clamp(min=0))
        states.finish()
        return logits

    def _written(self, inputs: WindowInputs) -> Tensor:
        """Where the keys of a pass go, int64 [num_reqs * width]; of what does not count to the scratch page."""
        cache, table = self.state.kv_cache, inputs.block_table
        offsets = torch.arange(self.width, device=self.device)
        places = inputs.before[:, None] + offsets
        page = table.gather(1, (places // cache.page_size).clamp(max=table.shape[1] - 1))
        token = page * cache.page_size + places % cache.page_size
        return torch.where(offsets < inputs.num_new[:, None], token, cache.scratch_token).flatten()

    @torch.inference_mode()
    def view(self, rows: WindowRows, block_size: int) -> BlockContext:
        """Gives the state of some requests as a denoiser reads it; see `ContextSource.view`."""
        mamba, pages = self.state.read_by_denoiser(rows.slot_list)
        slots, table, lens = rows.slots, rows.block_table, self.lengths[rows.slots].int()
        if lens.device != mamba.conv.device:
            found = to_device(rows.slots_and_pages, mamba.conv.device)
            slots, table, lens = found[:, 0].contiguous(), found[:, 1:].int(), moved(lens, found.device)
        return BlockContext(
            layer_slot=self.state.layer_slot,
            states=states_for_block(mamba, slots),
            keys=PagedKeys.in_table(pages, table, lens, block_size, causal=False),
        )


@dataclass
class WindowPass:
    """The `Prefix` of a context pass over windows, [num_reqs, width, ...].

    Attributes:
        states: of the Mamba layers.
        num_new: int64 [num_reqs], tokens that count.
        keys: of the contexts before the pass.
    """

    layer_slot: Sequence[int]
    states: MambaAdvance
    num_new: Tensor
    keys: PagedKeys

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over the new tokens and advances its state; see `Prefix.scan`."""
        return self.states.scan(self.layer_slot[layer], u, delta, weights, self.num_new)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Appends the new keys and attends causally; see `Prefix.attend`."""
        return self.keys.attend(self.layer_slot[layer], query, key, value)
