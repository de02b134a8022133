"""One batched pass of the context tower: reads each request's state, writes what the pass adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from twotower_kernels.block_attention import attention, causal_mask, ragged_attention, reads_pages
from twotower_kernels.block_scan import ScanWeights, replay_scan
from twotower_spec.state.kv_cache import PagedKVCache, SeparateKeys
from twotower_spec.state.mamba_state import MambaAdvance, MambaState
from twotower_spec.state.paged_keys import PagedKeys
from twotower_spec.state.transfer import to_device

# Up to so many new tokens requests are scanned together; above, with those that bring up to twice as many.
ALIKE = 32


@dataclass(frozen=True)
class SimilarLengths:
    """Requests of a pass that are scanned together, padded to the longest.

    Attributes:
        requests: which of the pass, ascending.
        lens: int64 [num_reqs], new tokens of each; None if all bring equally many.
        unpacked: int64 [num_reqs, max_len], index of each token in the pass; padding repeats the request's own last
            one: what is masked counts zero times, but zero times another one's NaN would be NaN. None if nothing moves.
    """

    requests: list[int]
    lens: Tensor | None = None
    unpacked: Tensor | None = None

    def unpack(self, x: Tensor) -> Tensor:
        """[1, num_tokens, ...] of the pass to [num_reqs, max_len, ...]."""
        return x if self.unpacked is None else x[0][self.unpacked]


class RaggedLayout:
    """How tokens of requests with unequal numbers of new tokens stand in one row, and back.

    Attributes:
        query_lens: new tokens per request.
        uniform: all requests bring the same number; then nothing is moved.
        groups: all requests, by the number of their new tokens: one long prompt must not pad many short increments.
    """

    def __init__(self, query_lens: Sequence[int], device: torch.device) -> None:
        self.query_lens = list(query_lens)
        self.uniform = min(query_lens) == max(query_lens)
        if self.uniform:
            self.groups = [SimilarLengths(list(range(len(query_lens))))]
            return
        starts = list(accumulate(query_lens, initial=0))
        members: dict[int, list[int]] = {}
        for request, length in enumerate(query_lens):
            members.setdefault(0 if length <= ALIKE else length.bit_length(), []).append(request)
        self.groups = []
        packed, base = [0] * starts[-1], 0
        for _, requests in sorted(members.items()):
            lens = [self.query_lens[request] for request in requests]
            longest = max(lens)
            rows = [[starts[r] + min(i, n - 1) for i in range(longest)] for r, n in zip(requests, lens, strict=True)]
            for row, length in zip(rows, lens, strict=True):
                packed[row[0] : row[0] + length] = range(base, base + length)
                base += longest
            lens_tensor = to_device(lens, device) if min(lens) < longest else None
            self.groups.append(SimilarLengths(requests, lens_tensor, to_device(rows, device)))
        self._packed = to_device(packed, device)

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """[num_reqs, max_len, ...] of every group to [1, num_tokens, ...]."""
        if self.uniform:
            return parts[0]
        rows = [part.flatten(0, 1) for part in parts]
        joined: Tensor = rows[0] if len(rows) == 1 else torch.cat(rows)
        return joined[self._packed][None]

    def last_positions(self, device: torch.device) -> Tensor:
        """Flat index of the last token of every request."""
        return to_device([stop - 1 for stop in accumulate(self.query_lens)], device)


class ViewedKeys:
    """Keys of a causal pass for PyTorch: views of the cache, into which the pass writes its own keys first."""

    def __init__(
        self,
        cache: PagedKVCache,
        page_lists: list[list[int]],
        prefix_lens: Sequence[int],
        query_lens: Sequence[int],
        written: Tensor,
    ) -> None:
        """Looks at requests that have `prefix_lens` tokens in the cache and bring `query_lens`; `written` as below."""
        self._cache, self._query_lens, self._written = cache, query_lens, written
        key_lens = [p + q for p, q in zip(prefix_lens, query_lens, strict=True)]
        self._masks = self._causal_masks(prefix_lens) if max(query_lens) > 1 else None
        self._span = None
        if len(set(query_lens)) == 1 and len(set(prefix_lens)) == 1:
            span = cache.span(page_lists, key_lens[0])
            self._span = span if span.index is None else None
        if self._span is None:
            self._separate = SeparateKeys(cache, page_lists, key_lens)

    def _causal_masks(self, prefix_lens: Sequence[int]) -> list[Tensor]:
        """Masks that are added to the scores of each request, [num_queries, num_keys]: parts of one tensor."""
        cache, queries, longest = self._cache.keys, max(self._query_lens), max(prefix_lens)
        allowed = causal_mask(to_device([longest], cache.device), queries, longest + queries)[0]
        whole = cache.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
        # Query i sees the first longest + i + 1 keys; of a shorter prefix there are as many fewer.
        lens = zip(prefix_lens, self._query_lens, strict=True)
        return [whole[:length, longest - prefix : longest + length] for prefix, length in lens]

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends as `PagedKeys.attend`."""
        self._cache.write(slot, self._written, key.flatten(0, 1), value.flatten(0, 1))
        if self._span is not None:
            keys, values = self._span.take(self._cache.keys[slot]), self._span.take(self._cache.values[slot])
            return attention(query, keys, values, None if self._masks is None else self._masks[0][None])
        out = ragged_attention(
            query.flatten(0, 1),
            self._separate.keys(slot),
            self._separate.values(slot),
            self._query_lens,
            self._masks,
        )
        return out.view_as(query)


@dataclass
class ExtensionPass:
    """The `Prefix` of a context pass.

    Attributes:
        slots: Mamba slot of every request.
        provisional: Mamba states are left as they are and the scan's inputs kept, so that any prefix of the pass's
            tokens can be accepted afterwards.
        written: int64 [num_tokens], where each token's key goes.
    """

    layer_slot: Sequence[int]
    mamba: MambaState
    kv_cache: PagedKVCache
    slots: Sequence[int]
    page_lists: list[list[int]]
    prefix_lens: Sequence[int]
    layout: RaggedLayout
    provisional: bool = False
    kept: dict[int, list[tuple[Tensor, Tensor, ScanWeights]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.mamba.conv.device
        query_lens = self.layout.query_lens
        self._slots = [self.mamba.index([self.slots[r] for r in group.requests]) for group in self.layout.groups]
        self._states = [
            None if self.provisional else MambaAdvance(self.mamba, slots, len(group.requests))
            for group, slots in zip(self.layout.groups, self._slots, strict=True)
        ]
        index: list[int] = []
        for pages, start, length in zip(self.page_lists, self.prefix_lens, query_lens, strict=True):
            index.extend(self.kv_cache.token_index(pages, start, start + length))
        self.written = to_device(index, device)
        self._keys: PagedKeys | ViewedKeys
        cache = self.kv_cache
        if cache.pages.keys and reads_pages(cache.keys):
            self._keys = PagedKeys.of(cache.pages, self.page_lists, self.prefix_lens, query_lens, True, self.written)
        else:
            self._keys = ViewedKeys(cache, self.page_lists, self.prefix_lens, query_lens, self.written)

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over the new tokens and advances its state; see `Prefix.scan`."""
        slot, outputs = self.layer_slot[layer], []
        for group, slots, states in zip(self.layout.groups, self._slots, self._states, strict=True):
            inputs = group.unpack(u), group.unpack(delta)
            if states is None:
                self.kept.setdefault(layer, []).append((*inputs, weights))
                outputs.append(self.mamba.scan(slot, slots, *inputs, weights, group.lens))
            else:
                outputs.append(states.scan(slot, *inputs, weights, group.lens))
        return self.layout.pack(outputs)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Appends the new keys and attends causally; see `Prefix.attend`."""
        return self._keys.attend(self.layer_slot[layer], query, key, value)

    def finish(self) -> None:
        """Writes what the layers have left to the pass's end."""
        for states in self._states:
            if states is not None:
                states.finish()

    def replay(self, num_accepted: Sequence[int]) -> None:
        """Advances the Mamba states by the first tokens of a provisional pass, without the layers' matrix products."""
        device = self.mamba.conv.device
        accepted = [to_device([num_accepted[r] for r in group.requests], device) for group in self.layout.groups]
        for layer, inputs in self.kept.items():
            conv, ssm = self.mamba.conv[self.layer_slot[layer]], self.mamba.ssm[self.layer_slot[layer]]
            for (u, delta, weights), slots, counts in zip(inputs, self._slots, accepted, strict=True):
                conv[slots], ssm[slots] = replay_scan(u, delta, conv[slots], ssm[slots], weights, counts)
        self.kept.clear()
