"""One batched pass of the context tower: reads each request's state, writes what the pass adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twotower_kernels.block_attention import attention, causal_mask, ragged_attention, reads_pages
from twotower_kernels.block_scan import ScanWeights, block_scan, replay_scan
from twotower_spec.state.kv_cache import PagedKVCache, SeparateKeys
from twotower_spec.state.mamba_state import MambaState, Slots
from twotower_spec.state.paged_keys import PagedKeys


class RaggedLayout:
    """How tokens of requests with unequal numbers of new tokens stand in one row, and back.

    Attributes:
        query_lens: new tokens per request.
        uniform: all requests bring the same number; then nothing is moved.
    """

    def __init__(self, query_lens: Sequence[int], device: torch.device) -> None:
        self.query_lens = list(query_lens)
        self.max_len = max(query_lens)
        self.uniform = min(query_lens) == self.max_len
        self.lens_tensor: Tensor | None = None
        if not self.uniform:
            lens = torch.tensor(self.query_lens, device=device)
            self.lens_tensor = lens
            valid = torch.arange(self.max_len, device=device) < lens[:, None]
            self._packed = valid.flatten().nonzero()[:, 0]
            starts = lens.cumsum(0) - lens
            offsets = torch.arange(self.max_len, device=device)
            self._unpacked = starts[:, None] + torch.minimum(offsets, lens[:, None] - 1)

    def unpack(self, x: Tensor) -> Tensor:
        """[1, num_tokens, ...] to [num_reqs, max_len, ...]; padding repeats the request's own last token.

        Not another one's: what is masked counts zero times, but zero times NaN would be NaN.
        """
        return x if self.uniform else x[0][self._unpacked]

    def pack(self, x: Tensor) -> Tensor:
        """[num_reqs, max_len, ...] to [1, num_tokens, ...]."""
        return x if self.uniform else x.flatten(0, 1)[self._packed][None]

    def last_positions(self, device: torch.device) -> Tensor:
        """Flat index of the last token of every request."""
        return torch.tensor(self.query_lens, device=device).cumsum(0) - 1


class ViewedKeys:
    """Keys of a causal pass for PyTorch: views of the cache, into which the pass has written its own keys."""

    def __init__(
        self,
        cache: PagedKVCache,
        page_lists: list[list[int]],
        prefix_lens: Sequence[int],
        query_lens: Sequence[int],
    ) -> None:
        """Looks at requests that have `prefix_lens` tokens in the cache and bring `query_lens`."""
        self._cache, self._query_lens = cache, query_lens
        key_lens = [p + q for p, q in zip(prefix_lens, query_lens, strict=True)]
        self._masks = self._causal_masks(prefix_lens) if max(query_lens) > 1 else None
        self._span = None
        if len(set(query_lens)) == 1 and len(set(prefix_lens)) == 1:
            span = cache.span(page_lists, key_lens[0])
            self._span = span if span.index is None else None
        if self._span is None:
            self._separate = SeparateKeys(cache, page_lists, key_lens)

    def _causal_masks(self, prefix_lens: Sequence[int]) -> list[Tensor]:
        """What is added to the scores of every request, [num_queries, num_keys]: parts of one tensor."""
        cache, queries, longest = self._cache.keys, max(self._query_lens), max(prefix_lens)
        allowed = causal_mask(torch.tensor([longest], device=cache.device), queries, longest + queries)[0]
        whole = cache.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
        # Query i sees the first longest + i + 1 keys; of a shorter prefix there are as many fewer.
        lens = zip(prefix_lens, self._query_lens, strict=True)
        return [whole[:length, longest - prefix : longest + length] for prefix, length in lens]

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `PagedKeys.attend`; the pass's own keys are read from the cache, not from `key` and `value`."""
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
        provisional: Mamba states are left as they are and the scan's inputs kept, so that any prefix of the pass's
            tokens can be accepted afterwards.
    """

    layer_slot: Sequence[int]
    mamba: MambaState
    kv_cache: PagedKVCache
    slots: Slots
    page_lists: list[list[int]]
    prefix_lens: Sequence[int]
    layout: RaggedLayout
    provisional: bool = False
    kept: dict[int, tuple[Tensor, Tensor, ScanWeights]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.mamba.conv.device
        query_lens = self.layout.query_lens
        index: list[int] = []
        for pages, start, length in zip(self.page_lists, self.prefix_lens, query_lens, strict=True):
            index.extend(self.kv_cache.token_index(pages, start, start + length))
        self._written = torch.tensor(index, device=device)
        self._keys: PagedKeys | ViewedKeys
        cache = self.kv_cache
        if reads_pages(cache.keys):
            self._keys = PagedKeys.of(
                cache, cache.page_size, self.page_lists, self.prefix_lens, query_lens, causal=True
            )
        else:
            self._keys = ViewedKeys(cache, self.page_lists, self.prefix_lens, query_lens)

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over the new tokens and advances its state; see `Prefix.scan`."""
        slot = self.layer_slot[layer]
        conv, ssm = self.mamba.conv[slot], self.mamba.ssm[slot]
        u, delta = self.layout.unpack(u), self.layout.unpack(delta)
        lens = self.layout.lens_tensor
        y, new_conv, new_ssm = block_scan(
            u, delta, conv[self.slots], ssm[self.slots], weights, lens, return_state=not self.provisional
        )
        if self.provisional:
            self.kept[layer] = (u, delta, weights)
        else:
            assert new_conv is not None and new_ssm is not None
            conv[self.slots] = new_conv
            ssm[self.slots] = new_ssm
        return self.layout.pack(y)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Appends the new keys and attends causally; see `Prefix.attend`."""
        slot = self.layer_slot[layer]
        self.kv_cache.write(slot, self._written, key.flatten(0, 1), value.flatten(0, 1))
        return self._keys.attend(slot, query, key, value)

    def replay(self, num_accepted: Sequence[int]) -> None:
        """Advances the Mamba states by the first tokens of a provisional pass, without the layers' matrix products."""
        accepted = torch.tensor(num_accepted, device=self.mamba.conv.device)
        for layer, (u, delta, weights) in self.kept.items():
            slot = self.layer_slot[layer]
            conv, ssm = self.mamba.conv[slot], self.mamba.ssm[slot]
            conv[self.slots], ssm[self.slots] = replay_scan(
                u, delta, conv[self.slots], ssm[self.slots], weights, accepted
            )
        self.kept.clear()
