"""Parts that vLLM's CPU backend lacks for verifiers with Mamba-2 layers, most of them for speculative decoding.

`HybridCPUWorker` stands in for vLLM's own worker where such a verifier runs on a CPU, with whatever speculative method
or with none. It installs `vllm_twotower.v1.hybrid_repairs` and these:

* State updates that know of drafts. vLLM's kernels drop how many tokens were accepted and where the tokens of a request
  begin. Here each drafted token goes through the kernel of a plain decoding step, so that its bits are the same.
* Copies of states to the ends of blocks, for prefix caching (`align`), which are Triton kernels only.
* Prefills that end where a state is to be cached: the CPU's chunk scan returns no states from within.
* Experts with squared ReLU, for which the CPU backend has no kernel.

Each goes when vLLM passes its test in tests/vllm_plugin/v1/test_cpu_hybrid.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache, cached_property, wraps
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.mamba import mamba_mixer2
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.ops import ssu_dispatch
from vllm.model_executor.models import nemotron_h
from vllm.triton_utils import HAS_TRITON
from vllm.triton_utils.dispatcher import register_kernels
from vllm.v1.worker.cpu_worker import CPUWorker

from twotower_kernels.experts import ExpertChoice, grouped_experts, route
from vllm_twotower.compat import wrap_once
from vllm_twotower.v1 import hybrid_repairs

# Slot of the null block, which vLLM's kernels leave out.
NULL_SLOT = 0


class HybridCPUWorker(CPUWorker):
    """vLLM's CPU worker, with all repairs in place before it makes its model runner."""

    def init_device(self) -> None:
        """Installs the repairs, then does what vLLM's worker does."""
        install()
        super().init_device()


@cache
def install() -> None:
    """Puts the replacements into vLLM's modules, once; before a model is made."""
    hybrid_repairs.install()
    wrap_once(mamba_mixer2, "causal_conv1d_update", convolution_with_drafts)
    wrap_once(ssu_dispatch.CPUSSUBackend, "__call__", state_update_with_drafts)
    wrap_once(mamba_mixer2.MambaMixer2, "get_kv_cache_spec", ending_prefills_at_blocks)
    wrap_once(nemotron_h, "FusedMoEFactory", lambda stock: SquaredReluExperts)
    if not HAS_TRITON:  # with it, in its interpreter, vLLM's own kernels run, for model runner V2 too
        register_kernels(
            {
                "vllm.v1.worker.mamba_utils.precopy_mamba_align_fused_kernel": copy_before_step,
                "vllm.v1.worker.mamba_utils.postprocess_mamba_fused_kernel": copy_after_step,
            }
        )


def convolution_with_drafts(stock: Any) -> Any:
    """Every token of a request with drafts as a decoding step of its own, from the window before it."""

    @wraps(stock)
    def causal_conv1d_update(
        x: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: bool | str | None = None,
        conv_state_indices: Tensor | None = None,
        num_accepted_tokens: Tensor | None = None,
        query_start_loc: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        if num_accepted_tokens is None or query_start_loc is None or conv_state_indices is None:
            updated: Tensor = stock(
                x, conv_state, weight, bias, activation, conv_state_indices, query_start_loc=query_start_loc, **others
            )
            return updated
        width = weight.shape[1] - 1
        slots, starts, lengths = conv_state_indices[:, 0].long(), query_start_loc[:-1].long(), query_start_loc.diff()
        rows = torch.repeat_interleave(torch.arange(len(slots)), lengths.long())
        positions = torch.arange(len(x)) - starts[rows]
        # Tokens before the first one of the step: the last ones that count, [requests, channels, width].
        first = (num_accepted_tokens.long() - 1).clamp(min=0)
        before = conv_state[slots].gather(
            2, (first[:, None] + torch.arange(width))[:, None].expand(-1, conv_state.shape[1], -1)
        )
        windows = conv_state.new_zeros(1 + len(x), conv_state.shape[1], width)
        for column in range(width):
            at = positions - width + column
            own = x[(torch.arange(len(x)) - width + column).clamp(min=0)]
            earlier = before[rows, :, (at + width).clamp(max=width - 1)]
            windows[1:, :, column] = torch.where(at[:, None] >= 0, own.to(conv_state.dtype), earlier)
        conv_state[slots, :, : width - 1] = before[:, :, 1:]
        conv_state[slots[rows], :, width - 1 + positions] = x.to(conv_state.dtype)
        indices = torch.arange(NULL_SLOT + 1, len(windows), dtype=torch.int32)
        stepped: Tensor = stock(x.contiguous(), windows, weight, bias, activation, conv_state_indices=indices)
        return stepped

    return causal_conv1d_update


def state_update_with_drafts(stock: Any) -> Any:
    """Every token of a request with drafts as a decoding step of its own, from the state before it to its own."""

    @wraps(stock)
    def __call__(
        self: Any,
        state: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        z: Tensor | None = None,
        dt_softplus: bool = False,
        state_batch_indices: Tensor | None = None,
        dst_state_batch_indices: Tensor | None = None,
        null_block_id: int = NULL_SLOT,
        out: Tensor | None = None,
        num_accepted_tokens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        is_blackwell: bool = False,
    ) -> None:
        def update(tokens: Any, source: Tensor | None, target: Tensor | None, result: Tensor | None) -> None:
            gate = None if z is None else z[tokens]
            inputs = (state, x[tokens], dt[tokens], A, B[tokens], C[tokens], D, dt_bias, gate, dt_softplus)
            stock(self, *inputs, source, target, null_block_id, result, None, None, is_blackwell)

        targets = state_batch_indices if dst_state_batch_indices is None else dst_state_batch_indices
        if num_accepted_tokens is None or cu_seqlens is None or state_batch_indices is None:
            update(slice(None), first_column(state_batch_indices), first_column(dst_state_batch_indices), out)
            return
        assert targets is not None and out is not None
        accepted = (num_accepted_tokens.long() - 1).clamp(min=0)
        sources = state_batch_indices.gather(1, accepted[:, None])[:, 0]
        lengths = cu_seqlens.diff()
        for position in range(int(lengths.max()) if len(lengths) else 0):
            rows = (lengths > position).nonzero()[:, 0]
            tokens = cu_seqlens[rows].long() + position
            own = targets[rows, position].contiguous()
            state[own.long()] = state[sources[rows].long()]  # the kernel writes where it reads
            result = torch.empty_like(out[tokens])
            update(tokens, own, own, result)
            out[tokens] = result
            sources[rows] = own

    return __call__


def first_column(indices: Tensor | None) -> Tensor | None:
    """State indices as the CPU kernel reads them: one for each request, [requests]."""
    return indices if indices is None or indices.dim() == 1 else indices[:, 0].contiguous()


def ending_prefills_at_blocks(stock: Any) -> Any:
    """The spec of other Mamba layers, with which the scheduler ends a prefill where a state is cached."""

    @wraps(stock)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        return MambaBase.get_kv_cache_spec(self, vllm_config)

    return get_kv_cache_spec


class SquaredReluExperts(nn.Module):
    """Routed experts of a Nemotron-H layer, in the place of vLLM's; every tensor-parallel rank holds all of them.

    Args:
        shared_experts: module of the experts that every token passes, or None; its output is a part of each rank's.
        num_experts, top_k, hidden_size, intermediate_size: sizes.
        renormalize, num_expert_group, topk_group, e_score_correction_bias, routed_scaling_factor: of the routing.
        routed_input_transform, routed_output_transform: projections around the routed experts, or None.
        quant_config: must be None.
        others: what vLLM's kernels need besides.

    Raises:
        ValueError: the experts are quantised.
    """

    def __init__(
        self,
        *,
        shared_experts: nn.Module | None,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        renormalize: bool,
        num_expert_group: int,
        topk_group: int,
        e_score_correction_bias: Tensor,
        routed_scaling_factor: float,
        routed_input_transform: nn.Module | None = None,
        routed_output_transform: nn.Module | None = None,
        quant_config: Any = None,
        **others: Any,
    ):
        super().__init__()
        if quant_config is not None:
            raise ValueError(
                f"quantised experts ({quant_config.get_name()}) cannot run on a CPU; use a checkpoint in bfloat16"
            )
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size), requires_grad=False)
        self._choice = ExpertChoice(top_k, num_expert_group, topk_group, renormalize, routed_scaling_factor)
        # In a tuple, since the layer around this one owns and loads them.
        self._around = (shared_experts, e_score_correction_bias, routed_input_transform, routed_output_transform)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Takes the tensors of a checkpoint, named `3.up_proj.weight`, and yields the names of the own ones."""
        for name, weight in weights:
            expert, projection, _ = name.split(".")
            getattr(self, projection).data[int(expert)].copy_(weight)
            yield projection

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        """[tokens, hidden] through the chosen experts and the shared ones; router_logits [tokens, experts], float32."""
        shared_experts, bias, before, after = self._around
        x = hidden_states if before is None else before(hidden_states)[0]
        expert_ids, weights = route(router_logits.sigmoid(), bias, self._choice)
        routed = grouped_experts(x, self.up_proj, self.down_proj, expert_ids, weights)
        if after is not None:
            routed = after(routed)[0]
        if shared_experts is None:
            return routed
        shared = shared_experts(hidden_states)
        if get_tensor_model_parallel_world_size() > 1:
            shared = tensor_model_parallel_all_reduce(shared)
        total: Tensor = routed + shared
        return total


@dataclass(frozen=True)
class StateLayout:
    """Places of the states of all Mamba layers, as vLLM's kernels are told them; on a CPU addresses are numbers.

    Attributes:
        block_tables: addresses int64 [groups] of tables int32 [rows, columns].
        row_stride: elements from one row of a table to the next.
        bases, block_strides, element_sizes, inner_sizes, widths, groups: [states], of each state tensor the address,
            bytes from block to block, bytes and number of its elements (of a convolution: of one token), tokens that
            a convolution holds (0 for another state), and its group.
        dim_rows, dim_strides: of another layout of convolutions, see `check_options`.
    """

    block_tables: Tensor
    row_stride: int
    bases: Tensor
    block_strides: Tensor
    element_sizes: Tensor
    inner_sizes: Tensor
    widths: Tensor
    groups: Tensor
    dim_rows: Tensor
    dim_strides: Tensor

    @cached_property
    def _states(self) -> list[tuple[int, ...]]:
        columns = (self.bases, self.block_strides, self.element_sizes, self.inner_sizes, self.widths, self.groups)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def copy(self, row: int, source: int, target: int, bias: int) -> None:
        """Copies the states of one request in all layers between two of its blocks.

        Args:
            row: of the request.
            source, target: columns of its block table.
            bias: tokens by which the wanted state is later than the first one of the source. A convolution slides its
                window by as many tokens; another state lies as many columns further.
        """
        for base, block_stride, element_size, inner_size, width, group in self._states:
            table = int(self.block_tables[group]) + row * self.row_stride * ctypes.sizeof(ctypes.c_int32)
            size = inner_size * element_size
            to = base + _block(table, target) * block_stride
            if width:
                ctypes.memmove(to, base + _block(table, source) * block_stride + bias * size, (width - bias) * size)
            else:
                ctypes.memmove(to, base + _block(table, source + bias) * block_stride, size)


_NUM_LAYOUT = len(fields(StateLayout))


def copy_before_step(
    running_columns: Tensor, last_columns: Tensor, biases: Tensor, *layout_and_rows: Any, **options: Any
) -> None:
    """Copies the state of each row from the block of its last step to that of this one.

    Stands for `precopy_mamba_align_fused_kernel`, whose parameters it has.

    Args:
        running_columns, last_columns, biases: int32 [rows], as `StateLayout.copy` takes them; a last column of -1 has
            no state.
        layout_and_rows: of a `StateLayout`, then `row_of`, for which see `check_options`, and the number of rows.
        options: of the kernel.
    """
    layout = StateLayout(*layout_and_rows[:_NUM_LAYOUT])
    row_of, num_rows = layout_and_rows[_NUM_LAYOUT:]
    check_options(row_of, **options)
    for row in range(num_rows):
        source, target = int(last_columns[row]), int(running_columns[row])
        if source >= 0 and source != target:
            layout.copy(row, source, target, int(biases[row]))


def copy_after_step(
    accepted: Tensor,
    running_columns: Tensor,
    scheduled: Tensor,
    computed: Tensor,
    drafted: Tensor,
    *layout_and_rows: Any,
    block_size: int,
    **options: Any,
) -> None:
    """Copies the state at the end of a block that a step has filled to where it is cached.

    Stands for `postprocess_mamba_fused_kernel`, whose parameters it has. Where the block is the running one, the
    accepted count becomes 1, since the state now lies at its beginning.

    Args:
        accepted, running_columns, scheduled, computed, drafted: int32 [rows], numbers of tokens, and columns.
        layout_and_rows: of a `StateLayout`, then the accepted counts to be changed, `row_of` and the number of rows.
        block_size: in tokens.
        options: of the kernel.
    """
    layout = StateLayout(*layout_and_rows[:_NUM_LAYOUT])
    accepted_out, row_of, num_rows = layout_and_rows[_NUM_LAYOUT:]
    check_options(row_of, **options)
    for row in range(num_rows):
        first = int(computed[row]) + int(scheduled[row]) - int(drafted[row])  # tokens whose state is the first one
        end = (first + int(accepted[row]) - 1) // block_size * block_size
        if end < first:
            continue
        source, target = int(running_columns[row]), end // block_size - 1
        if source == target:
            accepted_out[row] = 1
        if source != target or end > first:
            layout.copy(row, source, target, end - first)


def check_options(
    row_of: Tensor | None, CONV_STATE_DIM_FIRST: bool = False, PRECOMPUTED_NEW_COMPUTED: bool = False, **_: Any
) -> None:
    """Refuses what model runner V1 does not do on a CPU, rather than copying the wrong bytes."""
    if row_of is not None or CONV_STATE_DIM_FIRST or PRECOMPUTED_NEW_COMPUTED:
        raise NotImplementedError("states are copied on a CPU for model runner V1 and the conv state layout SD only")


def _block(table: int, column: int) -> int:
    """Block number in a column of a row of a block table, whose address is given."""
    return ctypes.c_int32.from_address(table + column * ctypes.sizeof(ctypes.c_int32)).value
