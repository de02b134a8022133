"""Where a denoiser's context comes from, whoever owns the pages and states."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol

from torch import Tensor

from twotower_spec.state.block_context import BlockContext


class ContextSource(Protocol):
    """Owner of context state, which is read by slot: our own pool, or the cache of a serving engine."""

    @property
    def workspace_nbytes(self) -> int:
        """Bytes that views take on the denoiser's side, where state cannot be read in place."""
        ...

    def slots(self, request_ids: Iterable[Hashable]) -> Tensor:
        """Slots of requests, int64 [num_reqs] on the host.

        Raises:
            TwoTowerError: the state of one is not here.
        """
        ...

    def view(self, slots: Tensor, block_size: int) -> BlockContext:
        """Gives the state of some slots as a denoiser reads it, on the denoiser's device, for one block.

        Args:
            slots: int64 [num_reqs], on the host, where slots are handed out.
            block_size: tokens of the block.

        Returns:
            State that is only read; it may share memory with what an earlier call gave, whose use ends here.
        """
        ...
