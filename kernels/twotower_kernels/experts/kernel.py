"""Triton kernels of routing and of the experts that tokens chose. No launch waits for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.backend import on_its_device
from twotower_kernels.experts.quantisation import FOUR_BITS, GROUP_SIZE, float_shape
from twotower_kernels.experts.types import ExpertChoice, ExpertOutputs, ExpertScales, SharedExpert
from twotower_kernels.linear import mlp
from twotower_kernels.tuning import cdiv, next_power_of_2, settings

# Up to this many tokens our kernel makes router logits, in parts along the hidden dimension: cuBLAS would use only a
# handful of processors for the float64 product of a few tokens, after two launches that widen its operands.
MOST_TOKENS_IN_PARTS = 1024
# Ranking compares every pair with every other; beyond this many a sort costs less.
MOST_PAIRS_BY_RANK = 8192
# Up to this many tokens the launches of the products compute the shared expert too. With more, cuBLAS has larger tiles
# and so reads weights less often, which saves more than three launches cost. An estimate, not measured.
MOST_TOKENS_WITH_SHARED = 32
# Results here do not depend on whether a product and a sum are fused, and float32 products are faster fused.
LAUNCH = {"enable_fp_fusion": True}
# Most tokens that an expert has on average for the first and second kind of product; see `kind_of_product`.
FEW_ROWS, SOME_ROWS = 8, 64


@triton.jit(do_not_specialize=["num_tokens"])
def router_logits_kernel(
    x_ptr,  # [num_tokens, HIDDEN]
    router_ptr,  # [NUM_EXPERTS, HIDDEN]
    parts_ptr,  # float64 [cdiv(HIDDEN, PART), num_tokens, NUM_EXPERTS]
    num_tokens,
    x_token_stride,
    x_hidden_stride,
    router_expert_stride,
    router_hidden_stride,
    HIDDEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Products of one part of the hidden dimension; their sum over the parts is the logits."""
    part = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    experts = tl.program_id(1).to(tl.int64) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    token_exists, expert_exists = tokens < num_tokens, experts < NUM_EXPERTS
    logits = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float64)
    for start in range(0, PART, BLOCK_HIDDEN):
        within = start + tl.arange(0, BLOCK_HIDDEN)
        hidden = part * PART + within
        exists = (within < PART) & (hidden < HIDDEN)
        x = tl.load(
            x_ptr + tokens[:, None] * x_token_stride + hidden[None, :] * x_hidden_stride,
            mask=token_exists[:, None] & exists[None, :],
            other=0.0,
        )
        router = tl.load(
            router_ptr + hidden[:, None] * router_hidden_stride + experts[None, :] * router_expert_stride,
            mask=exists[:, None] & expert_exists[None, :],
            other=0.0,
        )
        wide = x
        if x.dtype.primitive_bitwidth == 16:
            # A sum over an axis of length 1 hides the 16-bit load: Triton 3.6 chooses the shape of a float64 product by
            # the narrowest load it depends on, and has none for 16 bits. Through float32, because the interpreter
            # converts bfloat16 to nothing else.
            wide = tl.sum(x.to(tl.float32)[None, :, :], axis=0)
        logits = tl.dot(wide.to(tl.float64), router.to(tl.float64), logits, out_dtype=tl.float64)
    tl.store(
        parts_ptr + (part * num_tokens + tokens[:, None]) * NUM_EXPERTS + experts[None, :],
        logits,
        mask=token_exists[:, None] & expert_exists[None, :],
    )


@triton.jit
def choose_experts_kernel(
    scores_ptr,  # [NUM_PARTS, num_tokens, NUM_GROUPS * GROUP_SIZE]: scores, or parts of logits
    bias_ptr,  # [NUM_GROUPS * GROUP_SIZE]
    expert_ids_ptr,  # int64 [num_tokens, TOP_K]
    expert_weights_ptr,  # [num_tokens, TOP_K]
    part_stride,
    token_stride,
    expert_stride,
    NUM_PARTS: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Expert ids and weights of one token; of equal corrected scores the lower id goes first."""
    token = tl.program_id(0).to(tl.int64)
    groups, members = tl.arange(0, BLOCK_GROUPS), tl.arange(0, BLOCK_MEMBERS)
    experts = groups[:, None] * GROUP_SIZE + members[None, :]
    exists = (groups[:, None] < NUM_GROUPS) & (members[None, :] < GROUP_SIZE)
    score_ptrs = scores_ptr + token * token_stride + experts.to(tl.int64) * expert_stride
    scores = tl.load(score_ptrs, mask=exists, other=0.0)
    for part in tl.static_range(1, NUM_PARTS):
        scores += tl.load(score_ptrs + part * part_stride, mask=exists, other=0.0)
    if FROM_LOGITS:
        scores = 1.0 / (1.0 + tl.exp(-scores))

    choice = scores + tl.load(bias_ptr + experts, mask=exists, other=0.0)
    # NaN equals nothing, so the searches below would find no expert; torch.topk also takes NaN for the largest.
    choice = tl.where(choice != choice, float("inf"), choice)
    if NUM_GROUPS > 1:
        eligible = tl.where(exists, choice, float("-inf"))
        best = tl.max(eligible, axis=1)
        best_member = tl.min(tl.where(eligible == best[:, None], members[None, :], BLOCK_MEMBERS), axis=1)
        second = tl.max(tl.where(members[None, :] == best_member[:, None], float("-inf"), eligible), axis=1)
        group_scores, closed = best + second, groups < NUM_GROUPS
        for _ in tl.static_range(TOP_GROUPS):
            highest = tl.max(tl.where(closed, group_scores, float("-inf")))
            group = tl.min(tl.where(closed & (group_scores == highest), groups, BLOCK_GROUPS))
            closed = closed & (groups != group)
        choice = tl.where(closed[:, None], 0.0, choice)

    slots = tl.arange(0, BLOCK_SLOTS)
    chosen_ids, weights = tl.zeros((BLOCK_SLOTS,), tl.int64), tl.zeros((BLOCK_SLOTS,), tl.float64)
    for slot in tl.static_range(TOP_K):
        highest = tl.max(tl.where(exists, choice, float("-inf")))
        chosen = tl.min(tl.where(exists & (choice == highest), experts, NUM_GROUPS * GROUP_SIZE))
        # The padding of a group has the ids of the next group, hence `exists`.
        weight = tl.sum(tl.where(exists & (experts == chosen), scores, 0.0)).to(tl.float64)
        chosen_ids = tl.where(slots == slot, chosen, chosen_ids)
        weights = tl.where(slots == slot, weight, weights)
        exists = exists & (experts != chosen)
    if NORMALISE:
        weights = weights / (tl.sum(weights) + 1e-20)
    places, wanted = token * TOP_K + slots, slots < TOP_K
    tl.store(expert_ids_ptr + places, chosen_ids, mask=wanted)
    tl.store(expert_weights_ptr + places, weights * SCALE, mask=wanted)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "num_ranking", "block_rows"])
def rank_pairs_kernel(
    expert_ids_ptr,  # int64 [num_pairs], a token's experts together
    order_ptr,  # int32 [num_pairs], pairs ordered by expert
    blocks_ptr,  # int64 [num_blocks], see `order_pairs`
    num_pairs,
    num_blocks,
    num_ranking,  # programs that rank pairs
    block_rows,
    EXPERT_RANGE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Sorts pairs by expert and, in programs of its own, lists the blocks of rows that they make."""
    program = tl.program_id(0)
    if program < num_ranking:
        _rank(expert_ids_ptr, order_ptr, program, num_pairs, EXPERT_RANGE, BLOCK_ITEMS, BLOCK_PAIRS)
    else:
        first = (program - num_ranking) * BLOCK_ITEMS
        _list_blocks(
            expert_ids_ptr, blocks_ptr, first, num_pairs, num_blocks, block_rows, EXPERT_RANGE, BLOCK_ITEMS, BLOCK_PAIRS
        )


@triton.jit
def _rank(
    expert_ids_ptr,
    order_ptr,
    program,
    num_pairs,
    EXPERT_RANGE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """The place of a pair is the number of pairs before it in the order (expert, pair)."""
    pairs = program * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    exists = pairs < num_pairs
    experts = tl.load(expert_ids_ptr + pairs, mask=exists, other=0).to(tl.int32)
    ranks = tl.zeros((BLOCK_ITEMS,), tl.int32)
    for start in range(0, num_pairs, BLOCK_PAIRS):
        others = start + tl.arange(0, BLOCK_PAIRS)
        # Padding gets an expert id above all others.
        theirs = tl.load(expert_ids_ptr + others, mask=others < num_pairs, other=EXPERT_RANGE).to(tl.int32)
        same_and_earlier = (theirs[None, :] == experts[:, None]) & (others[None, :] < pairs[:, None])
        before = (theirs[None, :] < experts[:, None]) | same_and_earlier
        ranks += tl.sum(before.to(tl.int32), axis=1)
    tl.store(order_ptr + ranks, pairs, mask=exists)


@triton.jit
def _list_blocks(
    expert_ids_ptr,
    blocks_ptr,
    first,
    num_pairs,
    num_blocks,
    block_rows,
    EXPERT_RANGE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Writes the entries of some blocks; those beyond the last block have no rows."""
    counts = tl.zeros((EXPERT_RANGE,), tl.int32)
    for start in range(0, num_pairs, BLOCK_PAIRS):
        pairs = start + tl.arange(0, BLOCK_PAIRS)
        chosen = tl.load(expert_ids_ptr + pairs, mask=pairs < num_pairs, other=0).to(tl.int32)
        counts += tl.histogram(chosen, EXPERT_RANGE, mask=pairs < num_pairs)
    per_expert = tl.cdiv(counts, block_rows)
    begins, blocks_before = tl.cumsum(counts, 0) - counts, tl.cumsum(per_expert, 0) - per_expert
    blocks = first + tl.arange(0, BLOCK_ITEMS)
    within = blocks[:, None] - blocks_before[None, :]
    is_of_expert = (within >= 0) & (within < per_expert[None, :])
    skipped = within * block_rows
    expert = tl.sum(tl.where(is_of_expert, tl.arange(0, EXPERT_RANGE)[None, :], 0), axis=1)
    begin = tl.sum(tl.where(is_of_expert, begins[None, :] + skipped, 0), axis=1)
    rows = tl.sum(tl.where(is_of_expert, tl.minimum(counts[None, :] - skipped, block_rows), 0), axis=1)
    entries = (expert.to(tl.int64) << 40) | (rows.to(tl.int64) << 32) | begin.to(tl.int64)
    tl.store(blocks_ptr + blocks, entries, mask=blocks < num_blocks)


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    rows,
    row_exists,
    columns,
    column_exists,
    x_row_stride,
    x_in_stride,
    weight_out_stride,
    weight_in_stride,
    IN_FEATURES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """`x[rows] @ weight[columns].T`, summed in float32."""
    within = tl.arange(0, BLOCK_IN)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_row_stride + within.to(tl.int64)[None, :] * x_in_stride
    weight_ptrs = (
        weight_ptr + columns.to(tl.int64)[None, :] * weight_out_stride + within.to(tl.int64)[:, None] * weight_in_stride
    )
    product = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, IN_FEATURES, BLOCK_IN):
        exists = within < IN_FEATURES - start
        x = tl.load(x_ptrs, mask=row_exists[:, None] & exists[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=exists[:, None] & column_exists[None, :], other=0.0)
        if weight.dtype != x.dtype:
            # Exact, as x has more bits; through float32, as the interpreter makes bfloat16 of nothing else.
            weight = weight.to(tl.float32).to(x.dtype)
        product = tl.dot(x, weight, product, input_precision="ieee")
        x_ptrs += BLOCK_IN * x_in_stride
        weight_ptrs += BLOCK_IN * weight_in_stride
    return product


@triton.jit
def _product_of_groups(
    x_ptr,
    weight_ptr,
    scale_ptr,
    rows,
    row_exists,
    columns,
    column_exists,
    x_row_stride,
    x_in_stride,
    weight_out_stride,
    weight_in_stride,
    IN_FEATURES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """`_product` with weights of 4 bits: the sum of each group of inputs is scaled before it is added."""
    num_groups: tl.constexpr = (IN_FEATURES + GROUP_SIZE - 1) // GROUP_SIZE
    within = tl.arange(0, GROUP_SIZE // 2)  # bytes, each an even and an odd input
    even_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_row_stride + 2 * within.to(tl.int64)[None, :] * x_in_stride
    weight_ptrs = (
        weight_ptr + columns.to(tl.int64)[None, :] * weight_out_stride + within.to(tl.int64)[:, None] * weight_in_stride
    )
    scale_ptrs = scale_ptr + columns.to(tl.int64) * num_groups
    product = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for group in range(num_groups):
        # Of bytes, not of inputs: a compiler that sees runs of equal masks loads many of them at once.
        exists = within < IN_FEATURES // 2 - group * (GROUP_SIZE // 2)
        x_mask = row_exists[:, None] & exists[None, :]
        even = tl.load(even_ptrs, mask=x_mask, other=0.0)
        odd = tl.load(even_ptrs + x_in_stride, mask=x_mask, other=0.0)
        both = tl.load(weight_ptrs, mask=exists[:, None] & column_exists[None, :], other=0)
        # Exact in any dtype; through float32, as the interpreter makes bfloat16 of nothing else.
        even_weight = ((both & 15).to(tl.float32) - 8.0).to(even.dtype)
        odd_weight = ((both >> 4).to(tl.float32) - 8.0).to(even.dtype)
        part = tl.dot(even, even_weight, input_precision="ieee")
        part = tl.dot(odd, odd_weight, part, input_precision="ieee")
        scales = tl.load(scale_ptrs + group, mask=column_exists, other=0.0)
        product += part * scales.to(tl.float32)[None, :]
        even_ptrs += GROUP_SIZE * x_in_stride
        weight_ptrs += GROUP_SIZE // 2 * weight_in_stride
    return product


@triton.jit
def _store_product(
    product, out_ptr, rows, row_exists, columns, column_exists, UP: tl.constexpr, OUT_FEATURES: tl.constexpr
):
    """Stores rows [..., OUT_FEATURES]; UP squares their positive part."""
    if UP:
        # Rounded where separate product, ReLU and square would round. A comparison, unlike a maximum, passes NaN on.
        narrow = product.to(out_ptr.dtype.element_ty).to(tl.float32)
        positive = tl.where(narrow < 0, 0.0, narrow)
        product = positive * positive
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
    tl.store(out_ptrs, product.to(out_ptr.dtype.element_ty), mask=row_exists[:, None] & column_exists[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_shared"])
def grouped_product_kernel(
    x_ptr,  # UP: [num_tokens, IN_FEATURES]; else [num_pairs, IN_FEATURES], rows ordered by expert
    weight_ptr,  # [NUM_EXPERTS, OUT_FEATURES, IN_FEATURES], of x's dtype, or narrower with scales; half with groups
    scale_ptr,  # [NUM_EXPERTS, OUT_FEATURES], or [.., .., cdiv(IN_FEATURES, GROUP_SIZE)], contiguous; or None
    out_ptr,  # [num_pairs, OUT_FEATURES]; UP: rows ordered by expert; else rows of a token together
    expert_ids_ptr,  # int64 [num_pairs], of a single token; read unless ORDERED
    order_ptr,  # int32 [num_pairs], from rank_pairs; read if ORDERED
    blocks_ptr,  # int64 [num_blocks], from rank_pairs; read if ORDERED
    shared_x_ptr,  # [num_tokens, SHARED_IN]; None where no shared expert is computed, as the next two
    shared_weight_ptr,  # [SHARED_OUT, SHARED_IN]
    shared_out_ptr,  # [num_tokens, SHARED_OUT], contiguous
    num_tokens,
    num_shared,  # programs of the shared expert
    x_row_stride,
    x_in_stride,
    weight_expert_stride,
    weight_out_stride,
    weight_in_stride,
    shared_x_row_stride,
    shared_x_in_stride,
    shared_out_stride,
    shared_in_stride,
    UP: tl.constexpr,
    ORDERED: tl.constexpr,
    TOP_K: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    SHARED_IN: tl.constexpr,
    SHARED_OUT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # inputs of a scale, with weights of 4 bits; else 0
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """`x @ weight[expert].T` of the rows of one expert; UP squares its positive part.

    The first programs compute the shared expert: they have the longest sums. The others share out the blocks of all
    experts, a block's columns in turn, so that rows and weights are found in the cache; those beyond the last block end
    at once.
    """
    program = tl.program_id(0)
    if shared_x_ptr is not None:
        if program < num_shared:
            # The rows of a block of columns in turn, so that its weights are found in the cache.
            row_blocks = tl.cdiv(num_tokens, BLOCK_ROWS)
            rows = program % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            columns = program // row_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            row_exists, column_exists = rows < num_tokens, columns < SHARED_OUT
            # Beside quantised experts its weights are the wider ones, and are not to take more shared memory.
            block_in: tl.constexpr = BLOCK_IN if scale_ptr is None else BLOCK_IN // 2
            product = _product(
                shared_x_ptr, shared_weight_ptr, rows, row_exists, columns, column_exists,
                shared_x_row_stride, shared_x_in_stride, shared_out_stride, shared_in_stride, SHARED_IN, block_in,
            )  # fmt: skip
            _store_product(product, shared_out_ptr, rows, row_exists, columns, column_exists, UP, SHARED_OUT)
            return
        program -= num_shared

    column_blocks: tl.constexpr = (OUT_FEATURES + BLOCK_OUT - 1) // BLOCK_OUT
    block = program // column_blocks
    if ORDERED:
        entry = tl.load(blocks_ptr + block)
        num_rows = ((entry >> 32) & 0xFF).to(tl.int32)
        if num_rows == 0:
            return
        expert = entry >> 40
        begin = (entry & 0xFFFFFFFF).to(tl.int32)
        end = begin + num_rows
    else:
        # The experts of a single token are distinct, so each has a block of one row.
        expert = tl.load(expert_ids_ptr + block).to(tl.int64)
        begin = block
        end = block + 1
    places = begin + tl.arange(0, BLOCK_ROWS)
    row_exists = places < end
    if ORDERED:
        pairs = tl.load(order_ptr + places, mask=row_exists, other=0)
    else:
        pairs = places
    if UP:
        rows_in, rows_out = pairs // TOP_K, places
    else:
        rows_in, rows_out = places, pairs

    columns = program % column_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column_exists = columns < OUT_FEATURES
    weight_ptr += expert * weight_expert_stride
    if GROUP_SIZE:
        scale_ptr += expert * OUT_FEATURES * ((IN_FEATURES + GROUP_SIZE - 1) // GROUP_SIZE)
        product = _product_of_groups(
            x_ptr, weight_ptr, scale_ptr, rows_in, row_exists, columns, column_exists,
            x_row_stride, x_in_stride, weight_out_stride, weight_in_stride, IN_FEATURES, GROUP_SIZE,
        )  # fmt: skip
    else:
        product = _product(
            x_ptr, weight_ptr, rows_in, row_exists, columns, column_exists,
            x_row_stride, x_in_stride, weight_out_stride, weight_in_stride, IN_FEATURES, BLOCK_IN,
        )  # fmt: skip
        if scale_ptr is not None:
            scales = tl.load(scale_ptr + expert * OUT_FEATURES + columns, mask=column_exists, other=0.0)
            product *= scales[None, :]
    _store_product(product, out_ptr, rows_out, row_exists, columns, column_exists, UP, OUT_FEATURES)


@on_its_device
def launch_route_tokens(x: Tensor, router: Tensor, bias: Tensor, choice: ExpertChoice) -> tuple[Tensor, Tensor]:
    """Launches `route_tokens`, with its arguments and results; two launches for few tokens."""
    (num_tokens, hidden), num_experts = x.shape, router.shape[0]
    if num_tokens > MOST_TOKENS_IN_PARTS:
        logits = F.linear(x.double(), router.double())
        return launch_choose(logits[None], True, bias, choice)
    tiles = settings("experts", "router_logits")
    parts = x.new_empty((cdiv(hidden, tiles["PART"]), num_tokens, num_experts), dtype=torch.float64)
    grid = (
        cdiv(num_tokens, tiles["BLOCK_TOKENS"]),
        cdiv(num_experts, tiles["BLOCK_EXPERTS"]),
        len(parts),
    )
    router_logits_kernel[grid](
        x,
        router,
        parts,
        num_tokens,
        *x.stride(),
        *router.stride(),
        HIDDEN=hidden,
        NUM_EXPERTS=num_experts,
        **tiles,
        **LAUNCH,
    )
    return launch_choose(parts, True, bias, choice)


@on_its_device
def launch_choose(parts: Tensor, from_logits: bool, bias: Tensor, choice: ExpertChoice) -> tuple[Tensor, Tensor]:
    """Launches `route` on scores [1, num_tokens, num_experts], or on parts of their logits."""
    num_parts, num_tokens, num_experts = parts.shape
    expert_ids = torch.empty((num_tokens, choice.top_k), dtype=torch.int64, device=parts.device)
    expert_weights = parts.new_empty((num_tokens, choice.top_k))
    choose_experts_kernel[(num_tokens,)](
        parts,
        bias.contiguous(),
        expert_ids,
        expert_weights,
        *parts.stride(),
        NUM_PARTS=num_parts,
        FROM_LOGITS=from_logits,
        TOP_GROUPS=choice.top_groups,
        NORMALISE=choice.normalise,
        SCALE=choice.scale,
        **choice_sizes(num_experts, choice.num_groups, choice.top_k),
        **settings("experts", "choose_experts"),
        **LAUNCH,
    )
    return expert_ids, expert_weights


def choice_sizes(num_experts: int, num_groups: int, top_k: int) -> dict[str, int]:
    """Sizes of what one program of `choose_experts` holds."""
    group_size = num_experts // num_groups
    return {
        "NUM_GROUPS": num_groups,
        "GROUP_SIZE": group_size,
        "TOP_K": top_k,
        "BLOCK_GROUPS": next_power_of_2(num_groups),
        "BLOCK_MEMBERS": next_power_of_2(group_size),
        "BLOCK_SLOTS": next_power_of_2(top_k),
    }


@on_its_device
def launch_grouped_experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    shared: SharedExpert | None,
    scales: ExpertScales | None,
) -> ExpertOutputs:
    """Launches `expert_outputs`, with its arguments and result, for at least one token."""
    (num_tokens, hidden), (num_experts, width), top_k = x.shape, up.shape[:2], expert_ids.shape[1]
    num_pairs = num_tokens * top_k
    kind = kind_of_product(num_tokens, top_k, num_experts, x.dtype, is_quantised=scales is not None)
    pairs = expert_ids.contiguous().view(-1)
    ordering = None if num_tokens == 1 else order_pairs(pairs, num_experts, settings("experts", kind)["BLOCK_ROWS"])
    squares, outputs = x.new_empty((num_pairs, width)), x.new_empty((num_pairs, hidden))
    up_scales, down_scales = (None, None) if scales is None else (scales.up, scales.down)
    shared_up, shared_down, shared_output = None, None, None
    if shared is not None and num_tokens <= MOST_TOKENS_WITH_SHARED:
        shared_squares, shared_output = x.new_empty((num_tokens, len(shared.up))), x.new_empty(x.shape)
        shared_up, shared_down = (x, shared.up, shared_squares), (shared_squares, shared.down, shared_output)
    elif shared is not None:
        shared_output = mlp(x, shared.up, shared.down).contiguous()
    _launch_product(x, up, up_scales, squares, pairs, ordering, shared_up, top_k, kind, is_up=True)
    _launch_product(squares, down, down_scales, outputs, pairs, ordering, shared_down, top_k, kind, is_up=False)
    return ExpertOutputs(outputs.view(num_tokens, top_k, hidden), expert_weights, shared_output)


def kind_of_product(num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype, *, is_quantised: bool) -> str:
    """Name of the settings for the number of rows that an expert has on average.

    A single token takes the same kernel, though it needs no tensor cores: the time goes into reading weights, the rows
    that pad a block are not loaded, and sums round as they do when there are other tokens.
    """
    if dtype == torch.float32:
        return "product_float32"
    rows = num_tokens * top_k / num_experts
    size = "few" if rows <= FEW_ROWS else "some" if rows <= SOME_ROWS else "many"
    return f"{'quantised' if is_quantised else 'product'}_{'one' if num_tokens == 1 else size}"


@on_its_device
def order_pairs(expert_ids: Tensor, num_experts: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """Sorts pairs by expert, and lists the blocks of rows that they make.

    Args:
        expert_ids: int64 [num_pairs], contiguous.
        num_experts: ids are below it.
        block_rows: most rows of a block, 255 at most; all of a block are of one expert.

    Returns:
        int32 [num_pairs]: pairs in the order of their experts, and in their own order within an expert.
        int64 [most_blocks(...)]: of every block in that order expert << 40 | number of rows << 32 | first row, which a
            program has with one load; 0 for what is no block.
    """
    num_pairs = len(expert_ids)
    num_blocks = most_blocks(num_pairs, num_experts, block_rows)
    tiles = settings("experts", "rank_pairs")
    if num_pairs > MOST_PAIRS_BY_RANK:
        order, num_ranking = expert_ids.argsort(stable=True).int(), 0
    else:
        order = expert_ids.new_empty(num_pairs, dtype=torch.int32)
        num_ranking = cdiv(num_pairs, tiles["BLOCK_ITEMS"])
    blocks = expert_ids.new_empty(num_blocks)
    rank_pairs_kernel[(num_ranking + cdiv(num_blocks, tiles["BLOCK_ITEMS"]),)](
        expert_ids,
        order,
        blocks,
        num_pairs,
        num_blocks,
        num_ranking,
        block_rows,
        EXPERT_RANGE=next_power_of_2(num_experts),
        **tiles,
        **LAUNCH,
    )
    return order, blocks


@on_its_device
def _launch_product(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    out: Tensor,
    pairs: Tensor,
    ordering: tuple[Tensor, Tensor] | None,
    shared: tuple[Tensor, Tensor, Tensor] | None,
    top_k: int,
    kind: str,
    is_up: bool,
) -> None:
    """Fills `out` [num_pairs, out_features], and the last of the shared expert's rows, weight and output."""
    _, out_features, in_features = float_shape(weight)
    tiles = settings("experts", kind)
    num_tokens, num_shared = len(pairs) // top_k, 0
    shared_strides: tuple[int, ...] = (0, 0, 0, 0)
    shared_x, shared_weight, shared_out = shared or (None, None, None)
    if shared is not None:
        num_shared = cdiv(num_tokens, tiles["BLOCK_ROWS"]) * cdiv(len(shared[1]), tiles["BLOCK_OUT"])
        shared_strides = (*shared[0].stride(), *shared[1].stride())
    # Of a single token every pair is a block of its own.
    order, blocks = ordering or (pairs, pairs)
    grouped_product_kernel[(num_shared + len(blocks) * cdiv(out_features, tiles["BLOCK_OUT"]),)](
        x,
        weight,
        None if scales is None else scales.contiguous(),
        out,
        pairs,
        order,
        blocks,
        shared_x,
        shared_weight,
        shared_out,
        num_tokens,
        num_shared,
        *x.stride(),
        *weight.stride(),
        *shared_strides,
        UP=is_up,
        ORDERED=ordering is not None,
        TOP_K=top_k,
        IN_FEATURES=in_features,
        OUT_FEATURES=out_features,
        SHARED_IN=0 if shared_weight is None else shared_weight.shape[1],
        SHARED_OUT=0 if shared_weight is None else shared_weight.shape[0],
        GROUP_SIZE=GROUP_SIZE if weight.dtype == FOUR_BITS else 0,
        **tiles,
        **LAUNCH,
    )


def most_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """Most blocks of rows that any choice of experts can make; the host does not know the actual choice.

    With v experts visited, the sum of ceil(count / rows) is at most (num_pairs + v (rows - 1)) / rows.
    """
    visited = min(num_pairs, num_experts)
    return (num_pairs + visited * (block_rows - 1)) // block_rows
