"""Settings that attention over pages may be launched with, and what is compiled ahead of time."""

from __future__ import annotations

import torch
import triton

from twotower_kernels.block_attention.kernel import (
    LAUNCH,
    attend_kernel,
    attend_settings,
    combine_kernel,
    precision_of,
)
from twotower_kernels.compilation import Variant
from twotower_kernels.tuning import Settings, settings


def _candidates(blocks: list[tuple[int, int, int, int]]) -> list[Settings]:
    """Settings by (BLOCK_ROWS, BLOCK_KEYS, num_warps, num_stages), each with two lengths of a part."""
    names = ("BLOCK_ROWS", "BLOCK_KEYS", "num_warps", "num_stages")
    return [dict(zip(names, block, strict=True)) | {"KEYS_PER_PART": part} for block in blocks for part in (256, 512)]


# What the tuner may choose from.
CANDIDATES: dict[str, list[Settings]] = {
    "attend": _candidates(
        [
            (64, 32, 4, 3),
            (64, 32, 8, 3),
            (64, 64, 4, 2),
            (64, 64, 8, 2),
            (128, 32, 4, 3),
            (128, 64, 8, 2),
            (128, 64, 8, 3),
        ]
    ),
    "attend_few_rows": _candidates([(16, 32, 2, 4), (16, 64, 2, 3), (16, 64, 4, 3), (16, 128, 4, 2)]),
    "attend_float32": _candidates([(16, 16, 4, 2), (32, 16, 4, 2), (32, 16, 8, 2), (32, 32, 8, 2)]),
    "combine": [{"BLOCK_ROWS": rows, "num_warps": warps, "num_stages": 3} for rows, warps in ((1, 1), (4, 1), (8, 2))],
}


def variants() -> list[Variant]:
    """Variants launched at the shapes of the release (32 heads, 2 of keys and values) and of the bundled trio."""
    return [
        _attend("bf16", queries=16, split=True),
        _attend("bf16", queries=16, split=False),
        _attend("bf16", queries=16, split=True, causal=True),
        _attend("bf16", queries=1, split=True, causal=True),
        _attend("bf16", queries=1, split=False, causal=True),
        _attend("fp16", queries=16, split=True),
        _attend("fp32", queries=16, split=True),
        _attend("fp32", queries=1, split=False, causal=True),
        _attend("bf16", queries=16, split=False, group=2, head_dim=64),
        _attend("fp32", queries=16, split=False, group=2, head_dim=64),
        _combine("bf16"),
        _combine("fp32"),
    ]


def _attend(
    dtype: str, queries: int, split: bool, causal: bool = False, group: int = 16, head_dim: int = 128
) -> Variant:
    tensors = ("query", "key", "value", "key_cache", "value_cache")
    strides = [f"{tensor}_{axis}_stride" for tensor in tensors for axis in ("token", "head")]
    strides += [f"{cache}_page_stride" for cache in ("key_cache", "value_cache")]
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    name = attend_settings(torch_dtype, queries * group)
    chosen = dict(settings("block_attention", name))
    del chosen["KEYS_PER_PART"]
    num_warps, num_stages = chosen.pop("num_warps"), chosen.pop("num_stages")
    signature = dict.fromkeys(tensors, f"*{dtype}") | {"out": "*fp32" if split else f"*{dtype}"}
    signature |= {"log_totals": "*fp32"} if split else {}
    aligned = (*signature, *strides)
    signature |= dict.fromkeys(("block_table", "context_lens", "query_start_loc"), "*i32")
    signature |= {"written": "*i64"} if causal else {}  # by passes of the context tower
    signature |= {"scale": "fp32"} | dict.fromkeys([*strides, "table_stride", "num_tokens", "num_parts"], "i32")
    return Variant(
        f"{name}[{dtype} {queries}x{group}x{head_dim}{' split' * split}{' causal' * causal}]",
        attend_kernel,
        signature,
        chosen
        | ({} if split else {"log_totals": None})
        | ({} if causal else {"written": None})
        | {"GROUP": group, "HEAD_DIM": head_dim, "PAGE_SIZE": 16, "CAUSAL": causal, "SPLIT": split}
        | {"PRECISION": precision_of(torch_dtype), "BLOCK_DIM": triton.next_power_of_2(head_dim)},
        num_warps,
        num_stages,
        aligned=aligned,
        options=LAUNCH,
    )


def _combine(dtype: str) -> Variant:
    chosen = dict(settings("block_attention", "combine"))
    num_warps, num_stages = chosen.pop("num_warps"), chosen.pop("num_stages")
    return Variant(
        f"combine[{dtype} 128]",
        combine_kernel,
        {"averages": "*fp32", "log_totals": "*fp32", "out": f"*{dtype}", "num_rows": "i32", "num_parts": "i32"},
        chosen | {"HEAD_DIM": 128, "BLOCK_DIM": 128},
        num_warps,
        num_stages,
        options=LAUNCH,
    )
