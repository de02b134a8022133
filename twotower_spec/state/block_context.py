"""What the denoiser reads of the context: fixed for a whole block, on the denoiser's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_kernels.block_attention import attention, padding_mask
from twotower_kernels.block_scan import ScanWeights, block_scan


@dataclass
class BlockContext:
    """Read-only context state of some requests, plus room for a block's own keys and values.

    The keys of the block stand in front of the context's, so that one workspace serves every step: attention without
    positions does not mind the order, and ragged contexts end in padding.

    Attributes:
        layer_slot: index of each layer among the layers of its kind.
        conv, ssm: Mamba states [num_mamba_layers, num_reqs, ...], never written.
        keys, values: [num_attention_layers, num_reqs, block_size + longest context, kv_heads, head_dim]; the first
            `block_size` are overwritten by every step.
        context_lens: tokens of context per request.
        block_size: tokens of the block.
    """

    layer_slot: Sequence[int]
    conv: Tensor
    ssm: Tensor
    keys: Tensor
    values: Tensor
    context_lens: Sequence[int]
    block_size: int

    def __post_init__(self) -> None:
        ragged = len(set(self.context_lens)) > 1
        num_keys = self.keys.shape[2]
        lens = torch.tensor(self.context_lens, device=self.keys.device)
        self.mask = padding_mask(lens + self.block_size, num_keys) if ragged else None

    def select(self, rows: list[int]) -> BlockContext:
        """The same for some of the rows, in the given order."""
        index = torch.tensor(rows, device=self.keys.device)
        context_lens = [self.context_lens[row] for row in rows]
        num_keys = self.block_size + max(context_lens)
        return BlockContext(
            layer_slot=self.layer_slot,
            conv=self.conv[:, index],
            ssm=self.ssm[:, index],
            keys=self.keys[:, index, :num_keys],
            values=self.values[:, index, :num_keys],
            context_lens=context_lens,
            block_size=self.block_size,
        )

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over the block from the context's state; see `Prefix.scan`."""
        slot = self.layer_slot[layer]
        return block_scan(u, delta, self.conv[slot], self.ssm[slot], weights, return_state=False)[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends to context and block without any mask inside the block; see `Prefix.attend`."""
        slot = self.layer_slot[layer]
        keys, values = self.keys[slot], self.values[slot]
        keys[:, : self.block_size] = key
        values[:, : self.block_size] = value
        return attention(query, keys, values, self.mask)
