"""The pool: who owns which slot and pages, how far each request is computed, and how it moves on or back."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from twotower_spec.config import TwoTowerConfig
from twotower_spec.errors import ArgumentError, StateFullError
from twotower_spec.state.block_context import BlockContext, BlockWorkspace, keys_for_block, states_for_block
from twotower_spec.state.extension import ExtensionPass, RaggedLayout
from twotower_spec.state.kv_cache import PagedKVCache
from twotower_spec.state.mamba_state import MambaState
from twotower_spec.state.mirror import PoolMirror
from twotower_spec.state.paged_keys import LayerPages
from twotower_spec.state.token_history import TokenHistory, TokenSequence, tokens_from
from twotower_spec.state.transfer import to_device
from twotower_spec.towers import ContextTower
from twotower_spec.towers.model import TwoTowers

RequestId = Hashable
RequestT = TypeVar("RequestT", bound=Hashable)
LogitsWanted = Literal["last", "all", "none"]

DEFAULT_PAGE_SIZE = 16
DEFAULT_TOKEN_BUDGET = 2048


@dataclass
class RequestEntry:
    """The pool's bookkeeping of one request."""

    slot: int
    pages: list[int] = field(default_factory=list)
    history: TokenHistory = field(default_factory=TokenHistory)
    last_used: int = 0

    @property
    def token_ids(self) -> list[int]:
        """Tokens whose state is held."""
        return self.history.tolist()


@dataclass(frozen=True)
class Snapshot:
    """Mamba states and lengths of some requests at one moment; keys and values stay where they are."""

    slots: dict[RequestId, tuple[int, int]]
    conv: Tensor
    ssm: Tensor


@dataclass
class Extension:
    """Result of a context pass.

    Attributes:
        logits: float32 [num_wanted, vocab] in request order: one row per request ("last"), one per token ("all"), or
            None.
    """

    logits: Tensor | None
    _state: ContextState
    _pass: ExtensionPass
    _increments: Mapping[RequestId, list[int]]
    _entries: Mapping[RequestId, RequestEntry]
    _open: bool

    def accept(self, num_accepted: Mapping[RequestId, int]) -> None:
        """Keeps the first tokens of a provisional pass per request and forgets the rest.

        The Mamba states are replayed from the state before the pass; keys beyond the accepted ones are left to be
        overwritten.

        Raises:
            ArgumentError: a number is missing or out of range, the pass was not provisional or has been accepted, or a
                request was released or extended since. Nothing is changed then.
        """
        if not self._open:
            raise ArgumentError("this pass was not provisional or has been accepted; nothing is left to accept")
        for (request_id, tokens), start in zip(self._increments.items(), self._pass.prefix_lens, strict=True):
            entry = self._entries[request_id]
            if self._state.entry(request_id) is not entry or len(entry.history) != start:
                raise ArgumentError(
                    f"request {request_id!r} was released or extended since the pass; accept a pass first of all"
                )
            count = num_accepted.get(request_id, -1)
            if not 0 <= count <= len(tokens):
                raise ArgumentError(
                    f"num_accepted of request {request_id!r} is {count}; the pass had {len(tokens)} tokens, give 0 to "
                    f"{len(tokens)}"
                )
        self._open = False
        self._state.note_writes(None, self._pass.slots)
        self._pass.replay([num_accepted[request_id] for request_id in self._increments])
        for request_id, tokens in self._increments.items():
            self._entries[request_id].history.extend(tokens[: num_accepted[request_id]])


class ContextState:
    """Context tower state of many requests, allocated once; a `ContextSource`.

    Slots are claimed by request id. When slots or pages run out, the least recently used request that the call does
    not need is evicted; the evicted one simply starts over when it comes back.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        num_slots: int,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_size: int = DEFAULT_PAGE_SIZE,
        room_to_grow: bool = False,
        denoiser_device: torch.device | None = None,
        denoiser_dtype: torch.dtype | None = None,
        scratch: bool = False,
    ) -> None:
        """Allocates the pool.

        Args:
            config: geometry.
            num_slots: requests that can be held at once.
            num_pages: KV pages of `page_size` tokens, shared by all requests.
            dtype: dtype of keys, values and convolution histories; SSM states are float32 (float64 for float64).
            device: where the context tower is.
            page_size: tokens per page.
            room_to_grow: every slot begins in a stretch of pages of its own, so that the pages of requests that grow
                side by side stay consecutive; False fills the pool from the front.
            denoiser_device: where the denoiser reads; None for the pool's device.
            denoiser_dtype: what it reads in; None for the pool's dtype.
            scratch: a slot and a page more that nobody owns, for passes of fixed shape.
        """
        device = torch.device(device)
        self.config = config
        self.num_slots, self.num_pages = num_slots, num_pages
        self.denoiser_device, self.denoiser_dtype = denoiser_device or device, denoiser_dtype or dtype
        self.mamba = MambaState(config, num_slots + scratch, dtype, device)
        self.kv_cache = PagedKVCache(config, num_pages, page_size, dtype, device, scratch)
        self.num_evictions = 0
        self.num_restarts = 0
        self._entries: dict[RequestId, RequestEntry] = {}
        self._in_slot: dict[int, RequestEntry] = {}
        self._free_slots = _all_slots(num_slots)
        self._workspace: BlockWorkspace | None = None
        self._mirror: PoolMirror | None = None
        self._pages_per_slot = num_pages // num_slots if room_to_grow else 0
        self._clock = itertools.count(1)
        kinds = config.layer_kinds
        # Index of each layer among those of its kind.
        self.layer_slot = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]

    @classmethod
    def for_towers(
        cls,
        towers: TwoTowers,
        num_slots: int,
        num_pages: int,
        room_to_grow: bool = False,
        scratch: bool = False,
    ) -> ContextState:
        """Allocates a pool where the context tower is, which the denoiser, if there is one, reads where it is."""
        reader = towers.denoiser if towers.has_denoiser else towers.context
        return cls(
            towers.config,
            num_slots,
            num_pages,
            towers.dtype,
            towers.context.device,
            room_to_grow=room_to_grow,
            denoiser_device=reader.device,
            denoiser_dtype=reader.dtype,
            scratch=scratch,
        )

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """Requests that are held."""
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the pool."""
        return self.mamba.nbytes + self.kv_cache.nbytes

    @property
    def workspace_nbytes(self) -> int:
        """Bytes that views take on the denoiser's side, where they cannot read the pool in place."""
        return sum(room.nbytes for room in (self._workspace, self._mirror) if room is not None)

    @property
    def has_mirror(self) -> bool:
        """Whether the denoiser reads a copy of the pool, which is to be told what is written: see `note_writes`."""
        return self._mirror is not None

    def entry(self, request_id: RequestId) -> RequestEntry:
        """Bookkeeping of a request that is held.

        Raises:
            ArgumentError: it is not.
        """
        if request_id not in self._entries:
            raise ArgumentError(f"request {request_id!r} has no state here; claim it first")
        return self._entries[request_id]

    def num_computed_tokens(self, request_id: RequestId) -> int:
        """Tokens whose state is held for a request, 0 if it is not held."""
        entry = self._entries.get(request_id)
        return len(entry.history) if entry else 0

    def slots(self, request_ids: Iterable[RequestId]) -> Tensor:
        """Slots of requests that are held, int64 [num_reqs] on the host; they stay until a request is released."""
        return torch.tensor([self.entry(request_id).slot for request_id in request_ids], dtype=torch.int64)

    def num_pages_of(self, request_id: RequestId) -> int:
        """Pages that a request holds."""
        return len(self.entry(request_id).pages)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that a request of `num_tokens` tokens needs."""
        return self.kv_cache.pages_for(num_tokens)

    def claim(self, request_id: RequestId, num_tokens: int = 0, keep: Sequence[RequestId] = ()) -> None:
        """Gives a request a slot with the empty state, and pages for `num_tokens` tokens.

        Args:
            request_id: a request that is held already keeps its state and only gains pages.
            num_tokens: length to reserve pages for; more are taken later as needed.
            keep: requests that must not be evicted for it.

        Raises:
            StateFullError: everything is held by requests in `keep`.
        """
        keep = (*keep, request_id)
        if request_id not in self._entries:
            while not self._free_slots:
                self._evict_one(keep, "slot")
            slot = self._free_slots.pop()
            self.mamba.reset(slot)
            self.note_writes(None, [slot])
            self._entries[request_id] = self._in_slot[slot] = RequestEntry(slot)
        entry = self._entries[request_id]
        entry.last_used = next(self._clock)
        missing = self.kv_cache.pages_for(num_tokens) - len(entry.pages)
        while missing > self.kv_cache.num_free_pages:
            self._evict_one(keep, f"room for {num_tokens} tokens")
        if missing > 0:
            start = entry.slot * self._pages_per_slot
            if self._pages_per_slot and entry.pages:
                start = entry.pages[-1] + 1
            entry.pages.extend(self.kv_cache.allocate(missing, start))

    def release(self, request_id: RequestId) -> None:
        """Forgets a request; unknown ids are ignored."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            del self._in_slot[entry.slot]
            self._free_slots.append(entry.slot)
            self._free_slots.sort(reverse=True)
            self.kv_cache.release(entry.pages)
            if self._mirror is not None:
                self._mirror.clear_pages(entry.pages)

    def reset(self) -> None:
        """Forgets all requests, also where a pass that broke off left the accounts half done."""
        self._entries.clear()
        self._in_slot.clear()
        self._free_slots = _all_slots(self.num_slots)
        self.kv_cache.reset()
        if self._mirror is not None:
            self._mirror.reset()

    @torch.inference_mode()
    def snapshot(self, request_ids: Sequence[RequestId]) -> Snapshot:
        """Copies the Mamba states of requests that are held, to go back to with `roll_back`."""
        entries = {request_id: self.entry(request_id) for request_id in request_ids}
        index = [entry.slot for entry in entries.values()]
        slots = {request_id: (entry.slot, len(entry.history)) for request_id, entry in entries.items()}
        return Snapshot(slots, self.mamba.conv[:, index].clone(), self.mamba.ssm[:, index].clone())

    @torch.inference_mode()
    def roll_back(self, snapshot: Snapshot) -> None:
        """Takes requests back to a snapshot; they have only been extended since.

        Raises:
            ArgumentError: a request was released or taken back further since. Nothing is changed then.
        """
        for request_id, (slot, length) in snapshot.slots.items():
            entry = self.entry(request_id)
            if entry.slot != slot or len(entry.history) < length:
                raise ArgumentError(f"request {request_id!r} was released or rolled back since the snapshot; take anew")
        index = [slot for slot, _ in snapshot.slots.values()]
        self.note_writes(None, index)
        self.mamba.conv[:, index], self.mamba.ssm[:, index] = snapshot.conv, snapshot.ssm
        for request_id, (_, length) in snapshot.slots.items():
            self.entry(request_id).history.truncate(length)

    @torch.inference_mode()
    def extend(
        self,
        tower: ContextTower,
        increments: Mapping[RequestT, Sequence[int]],
        logits: LogitsWanted = "last",
        provisional: bool = False,
    ) -> Extension:
        """Runs the context tower over new tokens of several requests, in one pass.

        Args:
            tower: on the device of the pool.
            increments: at least one new token per request; requests that are not held are claimed.
            logits: at which tokens logits are computed.
            provisional: leave the state where it is until `Extension.accept` says how many tokens count.

        Returns:
            The logits, and the handle to accept a provisional pass.

        Raises:
            ArgumentError: a request brings no token.
            StateFullError: the requests of this call do not fit together.
        """
        ids = list(increments)
        tokens = {request_id: list(increments[request_id]) for request_id in ids}
        if not ids or not all(tokens.values()):
            raise ArgumentError("an increment is empty; leave out requests that bring no token")
        for request_id in ids:
            self.claim(request_id, self.num_computed_tokens(request_id) + len(tokens[request_id]), keep=ids)
        entries = [self._entries[request_id] for request_id in ids]
        device = tower.device
        layout = RaggedLayout([len(tokens[request_id]) for request_id in ids], device)
        step = ExtensionPass(
            layer_slot=self.layer_slot,
            mamba=self.mamba,
            kv_cache=self.kv_cache,
            slots=[entry.slot for entry in entries],
            page_lists=[entry.pages for entry in entries],
            prefix_lens=[len(entry.history) for entry in entries],
            layout=layout,
            provisional=provisional,
        )
        self.note_writes(step.written, [] if provisional else step.slots)
        flat = to_device([t for request_id in ids for t in tokens[request_id]], device)
        shape = (len(ids), -1) if layout.uniform else (1, -1)
        positions = None
        if logits == "last":
            positions = layout.last_positions(device)
        elif logits == "none":
            positions = flat.new_empty(0)
        out = tower(flat.view(shape), step, positions=positions)
        step.finish()
        if not provisional:
            for request_id, entry in zip(ids, entries, strict=True):
                entry.history.extend(tokens[request_id])
        return Extension(
            logits=None if logits == "none" else out,
            _state=self,
            _pass=step,
            _increments=dict(tokens.items()),
            _entries=dict(zip(ids, entries, strict=True)),
            _open=provisional,
        )

    def extend_in_chunks(
        self,
        tower: ContextTower,
        increments: Mapping[RequestT, Sequence[int]],
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        want_logits: bool = True,
    ) -> dict[RequestT, Tensor]:
        """Runs the context tower over any number of new tokens, at most `token_budget` of them in one pass.

        Returns:
            Logits [vocab] at the last new token of every request; empty without `want_logits`.
        """
        left = {request_id: list(tokens) for request_id, tokens in increments.items() if len(tokens)}
        last: dict[RequestT, Tensor] = {}
        while left:
            chunk = take_within_budget(left, token_budget)
            finished = [request_id for request_id, tokens in chunk.items() if len(tokens) == len(left[request_id])]
            result = self.extend(tower, chunk, logits="last" if want_logits and finished else "none")
            if result.logits is not None:
                rows = dict(zip(chunk, result.logits, strict=True))
                last.update({request_id: rows[request_id] for request_id in finished})
            for request_id, tokens in chunk.items():
                del left[request_id][: len(tokens)]
                if not left[request_id]:
                    del left[request_id]
        return last

    def continue_or_restart(self, request_id: RequestId, token_ids: TokenSequence) -> int:
        """Counts the tokens whose state is held; a request whose tokens do not continue them is started over."""
        entry = self._entries.get(request_id)
        if entry is None:
            return 0
        if not entry.history.begins(token_ids):
            self.restart(request_id)
            return 0
        return len(entry.history)

    def restart(self, request_id: RequestId) -> None:
        """Forgets what was computed for a request, and counts that."""
        self.release(request_id)
        self.num_restarts += 1

    @torch.inference_mode()
    def view(self, slots: Tensor, block_size: int) -> BlockContext:
        """See `ContextSource.view`.

        Raises:
            ArgumentError: a slot is free.
        """
        chosen: list[int] = slots.tolist()
        free = [slot for slot in chosen if slot not in self._in_slot]
        if free:
            raise ArgumentError(f"slot {free[0]} is free; claim it for a request first")
        entries = [self._in_slot[slot] for slot in chosen]
        for entry in entries:
            entry.last_used = next(self._clock)
        mamba, pages = self.read_by_denoiser(chosen)
        lens = [len(entry.history) for entry in entries]
        return BlockContext(
            layer_slot=self.layer_slot,
            states=states_for_block(mamba, mamba.index(chosen)),
            keys=keys_for_block(
                pages, [entry.pages for entry in entries], lens, block_size, self._workspace_for(block_size)
            ),
        )

    @torch.inference_mode()
    def read_by_denoiser(self, slots: Sequence[int]) -> tuple[MambaState, LayerPages]:
        """Gives states and pages where the denoiser reads them, up to date for the requests in some slots.

        The pool itself, or its mirror where the denoiser has another device or dtype.
        """
        pool = self.mamba.conv
        if (pool.device, pool.dtype) == (self.denoiser_device, self.denoiser_dtype):
            return self.mamba, self.kv_cache.pages
        if self._mirror is None:
            self._mirror = PoolMirror(
                self.config, self.num_slots, self.mamba, self.kv_cache, self.denoiser_device, self.denoiser_dtype
            )
            pages = np.array([page for entry in self._entries.values() for page in entry.pages], dtype=np.int64)
            self._mirror.note_tokens(self.kv_cache.tokens_of(to_device(pages, pool.device)).flatten())
            self._mirror.note_states(self._in_slot)
        self._mirror.update(slots)
        return self._mirror.mamba, self._mirror.kv_cache.pages

    def note_writes(self, token_index: Tensor | None, slots: Iterable[int]) -> None:
        """Says what is going to be written, so that the denoiser's copy of the pool, if there is one, follows.

        Args:
            token_index: int64 [num_tokens] on the device, where keys and values go; None for none.
            slots: whose Mamba states change.
        """
        if self._mirror is not None:
            if token_index is not None:
                self._mirror.note_tokens(token_index)
            self._mirror.note_states(slots)

    def block_context(self, request_ids: Sequence[RequestId], block_size: int) -> BlockContext:
        """Gives `view` of requests that are held."""
        return self.view(self.slots(request_ids), block_size)

    def _workspace_for(self, block_size: int) -> BlockWorkspace:
        """The workspace, with room for the whole pool and a block per slot; it takes memory when first written."""
        num_tokens = self.num_pages * self.kv_cache.page_size + self.num_slots * block_size
        if self._workspace is None or self._workspace.num_tokens < num_tokens:
            self._workspace = BlockWorkspace(self.config, num_tokens, self.denoiser_dtype, self.denoiser_device)
        return self._workspace

    def _evict_one(self, keep: Sequence[RequestId], what: str) -> None:
        candidates = [request_id for request_id in self._entries if request_id not in keep]
        if not candidates:
            raise StateFullError(
                f"no {what} is left for {len(set(keep))} requests at once (slots {self.num_slots}, pages "
                f"{self.num_pages} of {self.kv_cache.page_size} tokens); give the state more, or pass fewer requests"
            )
        self.release(min(candidates, key=lambda request_id: self._entries[request_id].last_used))
        self.num_evictions += 1


def _all_slots(num_slots: int) -> list[int]:
    """Descending: the lowest free slot is taken from the end."""
    return list(range(num_slots - 1, -1, -1))


def take_within_budget(increments: Mapping[RequestT, TokenSequence], token_budget: int) -> dict[RequestT, list[int]]:
    """The first tokens of each request, in order, until the budget is used up.

    Raises:
        ArgumentError: the budget is below 1.
    """
    if token_budget < 1:
        raise ArgumentError(f"token_budget {token_budget} is not allowed; give at least 1")
    chunk: dict[RequestT, list[int]] = {}
    for request_id, tokens in increments.items():
        if token_budget == 0:
            break
        chunk[request_id] = tokens_from(tokens[:token_budget], 0)
        token_budget -= len(chunk[request_id])
    return chunk
