"""Settings that routing and experts may be launched with, and what is compiled ahead of time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton

from twotower_kernels.compilation import Variant
from twotower_kernels.experts.kernel import (
    LAUNCH,
    choice_sizes,
    choose_experts_kernel,
    grouped_product_kernel,
    rank_pairs_kernel,
    router_logits_kernel,
)
from twotower_kernels.experts.quantisation import GROUP_SIZE
from twotower_kernels.tuning import Settings, settings


def _products(rows: int, *tiles: tuple[int, int, int, int]) -> list[Settings]:
    """Candidates from (BLOCK_OUT, BLOCK_IN, num_warps, num_stages)."""
    return [
        {"BLOCK_ROWS": rows, "BLOCK_OUT": outs, "BLOCK_IN": ins, "num_warps": warps, "num_stages": stages}
        for outs, ins, warps, stages in tiles
    ]


_PRODUCTS: dict[str, list[Settings]] = {
    "product_one": _products(
        16, (16, 256, 4, 4), (32, 64, 4, 4), (32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3)
    ),
    "product_few": _products(
        16, (32, 128, 4, 4), (32, 256, 4, 3), (32, 256, 4, 5), (64, 64, 4, 5), (64, 128, 4, 4), (128, 64, 4, 4)
    )
    + _products(16, (64, 128, 8, 4), (128, 128, 8, 5)),
    "product_some": _products(32, (32, 128, 4, 5), (64, 128, 4, 4), (128, 64, 4, 4))
    + _products(64, (64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 4)),
    "product_many": _products(64, (128, 64, 4, 4), (256, 64, 8, 3))
    + _products(128, (128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3), (256, 64, 8, 4)),
    "quantised_one": _products(16, (16, 512, 4, 4), (32, 128, 4, 4), (32, 256, 4, 4), (64, 128, 4, 4)),
    "quantised_few": _products(16, (32, 256, 4, 4), (32, 256, 4, 5), (64, 128, 4, 4), (64, 128, 4, 5), (128, 64, 4, 4))
    + _products(16, (64, 256, 8, 4), (128, 128, 8, 4)),
    "quantised_some": _products(32, (32, 128, 4, 5), (64, 128, 4, 4), (128, 64, 4, 4))
    + _products(64, (64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 4)),
    "quantised_many": _products(64, (128, 64, 4, 4), (256, 64, 8, 3))
    + _products(128, (128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3)),
    "product_float32": _products(16, (32, 32, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (128, 16, 8, 3)),
}

CANDIDATES: dict[str, list[Settings]] = {
    "router_logits": [
        {
            "PART": part,
            "BLOCK_TOKENS": 16,
            "BLOCK_EXPERTS": experts,
            "BLOCK_HIDDEN": 64,
            "num_warps": 4,
            "num_stages": 3,
        }
        for part, experts in ((128, 16), (192, 16), (384, 16), (192, 32), (384, 32))
    ],
    "choose_experts": [{"num_warps": w} for w in (1, 2, 4)],
    "rank_pairs": [
        {"BLOCK_ITEMS": i, "BLOCK_PAIRS": p, "num_warps": w} for i in (16, 32) for p in (128, 256) for w in (4, 8)
    ],
    **_PRODUCTS,
}


def variants() -> list[Variant]:
    """Specialisations for the released model: 128 experts of width 1856, 6 for a token, a shared one of 3712."""
    return [
        *(_router_variant(dtype) for dtype in ("bf16", "fp32")),
        *(_choice_variant(dtype, num_groups) for dtype in ("logits", "fp64", "fp32") for num_groups in (1, 8)),
        _ranking_variant(),
        *(
            _product_variant(kind, dtype, is_up, with_shared)
            for kind in _PRODUCTS
            for dtype in _weights(kind)
            for is_up in (True, False)
            for with_shared in _WITH_SHARED.get(kind.partition("_")[2], (False,))
        ),
    ]


# Triton's name of the dtype that holds weights of 4 bits.
_FOUR_BITS = "u8"
# Of the dtypes of quantised weights: below sm_89 Triton does not convert float8_e4m3fn.
_LEAST_CAPABILITY = {"fp8e4nv": 89, "i8": 80, _FOUR_BITS: 80}
# Whether the launches of a kind of product compute the shared expert too: up to `MOST_TOKENS_WITH_SHARED` tokens.
_WITH_SHARED = {"one": (True,), "few": (True, False), "some": (True, False), "float32": (True, False)}
_EXPERTS, _TOP_K, _HIDDEN, _WIDTH, _SHARED_WIDTH = 128, 6, 2688, 1856, 3712


def _variant(
    name: str, function: Any, settings_name: str, signature: dict[str, str], constants: dict[str, Any]
) -> Variant:
    """A variant whose pointers and strides are all aligned, with the settings of the table."""
    tiles = dict(settings("experts", settings_name))
    launch = {option: tiles.pop(option) for option in ("num_warps", "num_stages") if option in tiles}
    aligned = tuple(n for n, kind in signature.items() if kind.startswith("*") or n.endswith("_stride"))
    return Variant(name, function, signature, {**constants, **tiles}, aligned=aligned, options=LAUNCH, **launch)


def _router_variant(dtype: str) -> Variant:
    strides = {"x_token_stride": "i32", "router_expert_stride": "i32"}
    return _variant(
        f"router_logits {dtype}",
        router_logits_kernel,
        "router_logits",
        {"x_ptr": f"*{dtype}", "router_ptr": "*fp32", "parts_ptr": "*fp64", "num_tokens": "i32", **strides},
        {"x_hidden_stride": 1, "router_hidden_stride": 1, "HIDDEN": _HIDDEN, "NUM_EXPERTS": _EXPERTS},
    )


def _choice_variant(source: str, num_groups: int) -> Variant:
    from_logits = source == "logits"
    dtype = "fp64" if from_logits else source
    num_parts = triton.cdiv(_HIDDEN, settings("experts", "router_logits")["PART"]) if from_logits else 1
    return _variant(
        f"choose_experts from {source}, {num_groups} groups",
        choose_experts_kernel,
        "choose_experts",
        {
            "scores_ptr": f"*{dtype}",
            "bias_ptr": "*fp32",
            "expert_ids_ptr": "*i64",
            "expert_weights_ptr": f"*{dtype}",
            "part_stride": "i32",
            "token_stride": "i32",
        },
        {
            "expert_stride": 1,
            "NUM_PARTS": num_parts,
            "FROM_LOGITS": from_logits,
            "TOP_GROUPS": min(num_groups, 4),
            "NORMALISE": True,
            "SCALE": 2.5,
            **choice_sizes(_EXPERTS, num_groups, _TOP_K),
        },
    )


def _ranking_variant() -> Variant:
    pointers = {"expert_ids_ptr": "*i64", "order_ptr": "*i32", "blocks_ptr": "*i64"}
    sizes = dict.fromkeys(("num_pairs", "num_blocks", "num_ranking", "block_rows"), "i32")
    constants = {"EXPERT_RANGE": triton.next_power_of_2(_EXPERTS)}
    return _variant("rank_pairs", rank_pairs_kernel, "rank_pairs", pointers | sizes, constants)


def _weights(kind: str) -> tuple[str, ...]:
    """Triton's names of the dtypes that weights of a kind of product have."""
    if kind.startswith("quantised"):
        return tuple(_LEAST_CAPABILITY)
    return ("fp32",) if kind == "product_float32" else ("bf16",)


def _product_variant(kind: str, weights: str, is_up: bool, with_shared: bool) -> Variant:
    is_quantised = weights in _LEAST_CAPABILITY
    dtype = "bf16" if is_quantised else weights
    index = "*i64" if kind == "product_one" else "*i32"  # a single token's pairs stand in for what it does not read
    strides = dict.fromkeys(("x_row_stride", "weight_expert_stride", "weight_out_stride"), "i32")
    shared = dict.fromkeys(("shared_x_ptr", "shared_weight_ptr", "shared_out_ptr"), f"*{dtype}")
    shared_strides = ("shared_x_row_stride", "shared_out_stride")
    in_features, out_features, shared_sizes = _HIDDEN, _WIDTH, (_HIDDEN, _SHARED_WIDTH)
    if not is_up:
        in_features, out_features, shared_sizes = _WIDTH, _HIDDEN, shared_sizes[::-1]
    made = _variant(
        f"{kind} {'up' if is_up else 'down'}{f' {weights}' if is_quantised else ''}"
        f"{', shared expert' if with_shared else ''}",
        grouped_product_kernel,
        kind,
        {
            **dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}"),
            "weight_ptr": f"*{weights}",
            **({"scale_ptr": "*bf16" if weights == _FOUR_BITS else "*fp32"} if is_quantised else {}),
            "expert_ids_ptr": "*i64",
            "order_ptr": index,
            "blocks_ptr": "*i64",
            **dict.fromkeys(("num_tokens", "num_shared"), "i32"),
            **strides,
            **(shared | dict.fromkeys(shared_strides, "i32") if with_shared else {}),
        },
        {
            **({} if with_shared else dict.fromkeys(shared) | dict.fromkeys(shared_strides, 0)),
            "shared_x_in_stride": int(with_shared),
            "shared_in_stride": int(with_shared),
            "SHARED_IN": shared_sizes[0] if with_shared else 0,
            "SHARED_OUT": shared_sizes[1] if with_shared else 0,
            "x_in_stride": 1,
            "weight_in_stride": 1,
            "UP": is_up,
            "ORDERED": kind != "product_one",
            "TOP_K": _TOP_K,
            "IN_FEATURES": in_features,
            "OUT_FEATURES": out_features,
            "GROUP_SIZE": GROUP_SIZE if weights == _FOUR_BITS else 0,
            **({} if is_quantised else {"scale_ptr": None}),
        },
    )
    return replace(made, least_capability=_LEAST_CAPABILITY.get(weights, made.least_capability))
