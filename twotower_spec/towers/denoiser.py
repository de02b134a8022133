"""The denoiser tower: one pass over a noisy block, given context state."""

from collections.abc import Iterator

import torch
from torch import Tensor

from twotower_spec.config import TwoTowerConfig
from twotower_spec.towers.backbone import Backbone
from twotower_spec.towers.layers.weights import prefixed
from twotower_spec.towers.prefix import Prefix
from twotower_spec.towers.time_conditioning import TimeConditioning


class DenoiserTower(Backbone):
    """The block denoiser. Its prefix is a read-only view of the context tower's state.

    Attention is bidirectional inside the block, Mamba causal. Without time conditioning and with a block of one token
    it is the mock-AR step: the last token is read again, on the state before it.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        self.time_conditioning = TimeConditioning(config, dtype, device)

    def step(self, block: Tensor, prefix: Prefix, t: Tensor | None) -> Tensor:
        """One denoising step, all logits.

        Args:
            block: int64 [num_reqs, block_size], masked positions hold the mask token.
            prefix: context state of the rows.
            t: [num_reqs], masked fraction per row, or None for no time conditioning.

        Returns:
            [num_reqs, block_size, vocab], the mask token not excluded.
        """
        modulation = None if t is None else self.time_conditioning(t.to(self.device))
        logits: Tensor = self(block.to(self.device), prefix, modulation)
        return logits.view(*block.shape, -1)

    def initial_block(self, num_reqs: int, block_size: int, mask_token_id: int) -> Tensor:
        """A block of nothing but mask tokens, int64 [num_reqs, block_size]."""
        return torch.full((num_reqs, block_size), mask_token_id, device=self.device)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names, head and time conditioning included."""
        yield from prefixed("denoiser_tower", super().checkpoint_tensors())
        yield "lm_head.weight", self.head
        yield from self.time_conditioning.checkpoint_tensors()
