"""Contexts of a verifier that is the drafter's own context tower, read where vLLM's model runner V1 has them.

After a step vLLM's cache holds the state up to the token before the newest one of every request. It is read by the
numbers that the runner itself goes on from: the block of the Mamba states, how many tokens were accepted, the block
tables. So it is right after rejected drafts, prefix hits, preemptions and pieces of prompts, and costs no pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import MambaSpec

from twotower_spec.config import TwoTowerConfig, accumulation_dtype
from twotower_spec.errors import ArgumentError
from twotower_spec.state.block_context import (
    BlockContext,
    BlockKeys,
    BlockStates,
    BlockWorkspace,
    StackedStates,
    keys_for_block,
)
from twotower_spec.state.paged_keys import LayerPages
from twotower_spec.state.transfer import moved
from vllm_twotower.v1.page_layout import paged_views


@dataclass(frozen=True)
class MambaLayer:
    """Cache of one Mamba layer.

    Attributes:
        conv: [num_blocks, tokens, channels], of which the last `taps - 1` accepted ones count.
        ssm: [num_blocks, heads, head_dim, state_size].
        group: of the KV cache, whose block table says where a request is.
    """

    conv: Tensor
    ssm: Tensor
    group: int


@dataclass(frozen=True)
class AttentionGroup:
    """Attention layers that share a block table.

    Attributes:
        group: of the KV cache.
        layers: which of the attention layers they are.
        pages: their keys and values.
        pages_per_block: of vLLM's block, where its backend takes smaller ones.
    """

    group: int
    layers: list[int]
    pages: LayerPages
    pages_per_block: int


class EngineContext:
    """`ContextSource` over the cache of vLLM's model runner V1; slots are rows of its batch, right after a step."""

    def __init__(self, config: TwoTowerConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Remembers how the denoiser reads; the cache is not there yet.

        Args:
            config: geometry of both towers.
            device, dtype: the denoiser's.
        """
        self.config, self.device, self.dtype = config, device, dtype
        self._runner: Any = None
        self._workspaces: dict[int, BlockWorkspace] = {}

    def attach(self, runner: Any) -> None:
        """Looks up the layers' caches.

        Args:
            runner: vLLM's, whose cache is allocated.

        Raises:
            ArgumentError: it does not hold a context of this geometry in a way that can be read.
        """
        self._runner = runner
        vars(self).pop("_mamba", None)
        vars(self).pop("_attention", None)
        found = (len(self._mamba), sum(len(one.layers) for one in self._attention))
        expected = (len(self.config.mamba_layers), len(self.config.attention_layers))
        if found != expected:
            raise ArgumentError(f"the verifier has {found} Mamba and attention layers, and the drafter {expected}")

    @property
    def workspace_nbytes(self) -> int:
        """See `ContextSource`."""
        return sum(workspace.nbytes for workspace in self._workspaces.values())

    def slots(self, request_ids: Iterable[Hashable]) -> Tensor:
        """Rows of requests in the batch; see `ContextSource.slots`."""
        rows = self._runner.input_batch.req_id_to_index
        return torch.tensor([rows[request_id] for request_id in request_ids], dtype=torch.int64)

    @torch.inference_mode()
    def view(self, slots: Tensor, block_size: int) -> BlockContext:
        """Gives the contexts of rows, up to the token before the newest one; see `ContextSource.view`."""
        rows: list[int] = slots.tolist()
        kinds = self.config.layer_kinds
        return BlockContext(
            layer_slot=[kinds[:i].count(kind) for i, kind in enumerate(kinds)],
            states=self._states(rows),
            keys=self._keys(rows, block_size),
        )

    def _layers(self, of_mamba: bool) -> Iterable[tuple[Any, int, Any]]:
        """Layers of a kind in the order of the model, each with the number and the spec of its KV cache group."""
        groups = self._runner.kv_cache_config.kv_cache_groups
        modules = self._runner.compilation_config.static_forward_context
        found = [
            (extract_layer_index(name), number, group.kv_cache_spec, modules[name])
            for number, group in enumerate(groups)
            for name in group.layer_names
            if isinstance(group.kv_cache_spec, MambaSpec) == of_mamba
        ]
        return [(module, number, spec) for _, number, spec, module in sorted(found, key=lambda one: one[0])]

    @cached_property
    def _mamba(self) -> list[MambaLayer]:
        layers = [(*module.kv_cache[:2], number) for module, number, _ in self._layers(of_mamba=True)]
        if is_conv_state_dim_first():
            layers = [(conv.transpose(1, 2), ssm, number) for conv, ssm, number in layers]
        return [MambaLayer(*one) for one in layers]

    @cached_property
    def _attention(self) -> list[AttentionGroup]:
        views: dict[int, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        block_sizes = {}
        for layer, (module, number, spec) in enumerate(self._layers(of_mamba=False)):
            views[number].append((layer, *paged_views(module, module.kv_cache)))
            block_sizes[number] = spec.block_size
        groups = []
        for number, of_group in views.items():
            layers, keys, values = (list(column) for column in zip(*of_group, strict=True))
            pages = LayerPages(keys, values)
            groups.append(AttentionGroup(number, layers, pages, block_sizes[number] // pages.page_size))
        return groups

    def _blocks(self, group: int) -> Any:
        """Block table of a group, numpy [max_num_reqs, max_blocks]."""
        return self._runner.input_batch.block_table[group].get_numpy_array()

    def _states(self, rows: list[int]) -> BlockStates:
        runner, batch = self._runner, self._runner.input_batch
        # As vLLM does before it starts the next step: the counts come from the device.
        runner.num_accepted_tokens_event.synchronize()
        first = batch.num_accepted_tokens_cpu[rows].astype("int64") - 1
        columns = [0] * len(rows)
        if runner.cache_config.mamba_cache_mode == "align":
            columns = [runner.mamba_state_idx[batch.req_ids[row]] for row in rows]
        blocks = {}
        for group in {layer.group for layer in self._mamba}:
            table = self._blocks(group)
            blocks[group] = [table[rows, columns], table[rows, columns + first]]
        places = torch.tensor([first.tolist(), *(one.tolist() for pair in blocks.values() for one in pair)])
        first_token, *found = moved(places, self._mamba[0].conv.device) if blocks else places
        states = EngineStates(
            self._mamba,
            self.config.conv_kernel - 1,
            first_token,
            {group: (found[2 * i], found[2 * i + 1]) for i, group in enumerate(blocks)},
            self.device,
            self.dtype,
        )
        return states if states.is_in_place else states.copied()

    def _keys(self, rows: list[int], block_size: int) -> BlockKeys:
        lens: list[int] = (self._runner.input_batch.num_tokens_no_spec[rows] - 1).tolist()
        keys = []
        for group in self._attention:
            per_block, page_size = group.pages_per_block, group.pages.page_size
            counts = [-(-length // page_size) for length in lens]
            table = self._blocks(group.group)
            in_block = np.arange(per_block)
            page_lists = [
                (table[row, : -(-count // per_block), None] * per_block + in_block).flatten()[:count].tolist()
                for row, count in zip(rows, counts, strict=True)
            ]
            workspace = self._room(group, sum(counts) * page_size + len(rows) * block_size)
            keys.append(keys_for_block(group.pages, page_lists, lens, block_size, workspace))
        return keys[0] if len(keys) == 1 else KeysOfGroups(keys, [group.layers for group in self._attention])

    def _room(self, group: AttentionGroup, num_tokens: int) -> BlockWorkspace:
        """Room for copies, where keys cannot be read in place; it grows by doubling."""
        workspace = self._workspaces.get(group.group)
        if workspace is None or workspace.num_tokens < num_tokens:
            self._workspaces.pop(group.group, None)
            num_tokens = 1 << (num_tokens - 1).bit_length()
            workspace = BlockWorkspace(self.config, num_tokens, self.dtype, self.device, len(group.layers))
            self._workspaces[group.group] = workspace
        return workspace


@dataclass(frozen=True)
class EngineStates(BlockStates):
    """States that are read in vLLM's blocks, layer by layer, so that no copy of all layers is made.

    Attributes:
        layers: caches.
        width: tokens of a convolution's history.
        first: int64 [num_reqs], first token of the history in its block.
        blocks: by group, int64 [num_reqs] each, blocks of the convolution and of the SSM state.
        denoiser_device, dtype: what is read is wanted so.
    """

    layers: Sequence[MambaLayer]
    width: int
    first: Tensor
    blocks: dict[int, tuple[Tensor, Tensor]]
    denoiser_device: torch.device
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """See `BlockStates`."""
        return self.denoiser_device

    @property
    def is_in_place(self) -> bool:
        """Whether the denoiser is where the caches are."""
        return all(layer.conv.device == self.device for layer in self.layers)

    def read(self, slot: int) -> tuple[Tensor, Tensor]:
        """See `BlockStates.read`."""
        layer = self.layers[slot]
        of_conv, of_ssm = self.blocks[layer.group]
        tokens = self.first[:, None] + torch.arange(self.width, device=self.first.device)
        conv, ssm = layer.conv[of_conv[:, None], tokens], layer.ssm[of_ssm]
        return conv.to(self.device, self.dtype), ssm.to(self.device, accumulation_dtype(self.dtype))

    def select(self, rows: Tensor) -> EngineStates:
        """See `BlockStates.select`."""
        blocks = {group: (conv[rows], ssm[rows]) for group, (conv, ssm) in self.blocks.items()}
        return EngineStates(self.layers, self.width, self.first[rows], blocks, self.device, self.dtype)

    def copied(self) -> StackedStates:
        """The same on the denoiser's device, once for all steps of a block."""
        conv, ssm = zip(*(self.read(slot) for slot in range(len(self.layers))), strict=True)
        return StackedStates(torch.stack(conv), torch.stack(ssm))


class KeysOfGroups:
    """`BlockKeys` of layers in several KV cache groups."""

    def __init__(self, keys: Sequence[BlockKeys], layers: Sequence[Sequence[int]]) -> None:
        """Joins the groups.

        Args:
            keys: of every group.
            layers: which of the attention layers each holds.
        """
        self._keys, self._layers = keys, layers
        self._place = {layer: (i, j) for i, of_group in enumerate(layers) for j, layer in enumerate(of_group)}

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `BlockKeys.attend`."""
        group, layer = self._place[slot]
        return self._keys[group].attend(layer, query, key, value)

    def select(self, rows: Tensor) -> KeysOfGroups:
        """See `BlockKeys.select`."""
        return KeysOfGroups([keys.select(rows) for keys in self._keys], self._layers)
