"""What the denoiser reads of the context: fixed for a whole block, on the denoiser's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_kernels.block_attention import attention, ragged_attention
from twotower_kernels.block_scan import ScanWeights, block_scan
from twotower_spec.config import TwoTowerConfig


class BlockWorkspace:
    """Room for the keys and values that a block attends to, for one `BlockContext` at a time.

    Attributes:
        keys, values: [num_attention_layers, num_tokens, kv_heads, head_dim].
    """

    def __init__(self, config: TwoTowerConfig, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates room for `num_tokens` tokens, those of the blocks included."""
        shape = (len(config.attention_layers), num_tokens, config.num_key_value_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes


@dataclass
class BlockContext:
    """Read-only context state of some requests, plus room for a block's own keys and values.

    The keys of the block stand in front of the context's, so that one workspace serves every step: attention without
    positions does not mind the order.

    Attributes:
        layer_slot: index of each layer among the layers of its kind.
        conv, ssm: Mamba states [num_mamba_layers, num_reqs, ...], never written.
        workspace: per request `block_size` tokens, overwritten by every step, then its context.
        starts: index of each request's first token in the workspace.
        context_lens: tokens of context per request.
        block_size: tokens of the block.
    """

    layer_slot: Sequence[int]
    conv: Tensor
    ssm: Tensor
    workspace: BlockWorkspace
    starts: Sequence[int]
    context_lens: Sequence[int]
    block_size: int

    def __post_init__(self) -> None:
        device = self.workspace.keys.device
        first = torch.tensor(self.starts, device=device)[:, None]
        self._block_index = (first + torch.arange(self.block_size, device=device)).flatten()
        num_keys = self.context_lens[0] + self.block_size
        first_start = self.starts[0]
        self._alike = all(length == self.context_lens[0] for length in self.context_lens) and all(
            start == first_start + row * num_keys for row, start in enumerate(self.starts)
        )
        stored = (self.workspace.keys, self.workspace.values)
        if self._alike:
            stop = first_start + len(self.starts) * num_keys
            self._together = [t[:, first_start:stop].unflatten(1, (-1, num_keys)) for t in stored]
        else:
            self._rows = [[self._row(t, row) for row in range(len(self.starts))] for t in stored]

    def _row(self, stored: Tensor, row: int) -> tuple[Tensor, ...]:
        """Keys or values of one request, per layer [1, kv_heads, num_keys, head_dim]."""
        start = self.starts[row]
        return stored[:, None, start : start + self.block_size + self.context_lens[row]].transpose(2, 3).unbind()

    def select(self, rows: list[int]) -> BlockContext:
        """The same for some of the rows, in the given order."""
        index = torch.tensor(rows, device=self.conv.device)
        return BlockContext(
            layer_slot=self.layer_slot,
            conv=self.conv[:, index],
            ssm=self.ssm[:, index],
            workspace=self.workspace,
            starts=[self.starts[row] for row in rows],
            context_lens=[self.context_lens[row] for row in rows],
            block_size=self.block_size,
        )

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over the block from the context's state; see `Prefix.scan`."""
        slot = self.layer_slot[layer]
        return block_scan(u, delta, self.conv[slot], self.ssm[slot], weights, return_state=False)[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends to context and block without any mask inside the block; see `Prefix.attend`."""
        slot = self.layer_slot[layer]
        self.workspace.keys[slot].index_copy_(0, self._block_index, key.flatten(0, 1))
        self.workspace.values[slot].index_copy_(0, self._block_index, value.flatten(0, 1))
        if self._alike:
            keys, values = self._together
            return attention(query, keys[slot], values[slot])
        keys_of, values_of = ([row[slot] for row in rows] for rows in self._rows)
        out = ragged_attention(query.flatten(0, 1), keys_of, values_of, [self.block_size] * len(self.starts))
        return out.view_as(query)
