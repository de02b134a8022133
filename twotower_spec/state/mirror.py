"""The pool once more, where a denoiser of another device or dtype reads it: only what changed is copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from twotower_spec.config import TwoTowerConfig
from twotower_spec.state.kv_cache import PagedKVCache
from twotower_spec.state.mamba_state import MambaState
from twotower_spec.state.transfer import moved, to_device

# Copied at once, of all layers: as much room as a copy takes for a moment on either device.
TOKENS_AT_ONCE = 4096
STATES_AT_ONCE = 4


class PoolMirror:
    """Mamba states and pages of a pool on the denoiser's side, by the same numbers of slots and pages.

    Passes of the context tower say what they write. Keys are copied before the denoiser reads any, states when they are
    asked for: of a prompt that is read in several passes only the last one. Copies wait for the streams of both
    devices and both wait for them, which is how PyTorch copies between devices.

    Attributes:
        mamba: states, without those of a scratch slot.
        kv_cache: keys and values; who owns its pages is the pool's matter.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        num_slots: int,
        mamba: MambaState,
        kv_cache: PagedKVCache,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Allocates it, empty.

        Args:
            config: geometry.
            num_slots: whose states may be asked for.
            mamba, kv_cache: of the pool.
            device, dtype: the denoiser's.
        """
        self._pool = mamba, kv_cache
        self.mamba = MambaState(config, num_slots, dtype, device)
        num_pages = kv_cache.keys.shape[1] // kv_cache.page_size
        self.kv_cache = PagedKVCache(config, num_pages, kv_cache.page_size, dtype, device)
        self._device = device
        self._written: list[Tensor] = []
        self._num_written = 0
        self._changed: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.mamba.nbytes + self.kv_cache.nbytes

    def note_tokens(self, token_index: Tensor) -> None:
        """Remembers whose keys are going to be written, int64 [num_tokens] on the pool's device."""
        if self._num_written + len(token_index) > TOKENS_AT_ONCE:
            self._copy_tokens()
        self._written.append(token_index)
        self._num_written += len(token_index)

    def note_states(self, slots: Iterable[int]) -> None:
        """Remembers whose states are going to change."""
        self._changed.update(slots)

    def clear_pages(self, pages: list[int]) -> None:
        """Empties pages, as the pool does when it gets them back."""
        self.kv_cache.clear(pages)

    def reset(self) -> None:
        """Empties all pages; nothing in the pool is worth copying."""
        self.kv_cache.reset()
        self._written, self._num_written = [], 0
        self._changed.clear()

    def update(self, slots: Sequence[int]) -> None:
        """Copies all keys that were written, and the states of some slots, each if it changed since it was copied."""
        self._copy_tokens()
        stale = sorted(self._changed.intersection(slots))
        for start in range(0, len(stale), STATES_AT_ONCE):
            self._copy_states(stale[start : start + STATES_AT_ONCE])
        self._changed.difference_update(stale)

    def _copy_tokens(self) -> None:
        if not self._written:
            return
        cache = self._pool[1]
        written = self._written[0] if len(self._written) == 1 else torch.cat(self._written)
        for index in written.split(TOKENS_AT_ONCE):
            here = moved(index, self._device)
            _copy_rows(cache.keys, index, self.kv_cache.keys, here)
            _copy_rows(cache.values, index, self.kv_cache.values, here)
        self._written, self._num_written = [], 0

    def _copy_states(self, slots: list[int]) -> None:
        mamba = self._pool[0]
        index, here = to_device(slots, mamba.conv.device), to_device(slots, self._device)
        _copy_rows(mamba.conv, index, self.mamba.conv, here)
        _copy_rows(mamba.ssm, index, self.mamba.ssm, here)


def _copy_rows(source: Tensor, index: Tensor, target: Tensor, target_index: Tensor) -> None:
    """Copies [:, index] of all layers, in one piece."""
    target.index_copy_(1, target_index, moved(source.index_select(1, index), target.device, target.dtype))
