"""Settings that launches of a verification may take, and what is compiled ahead of time."""

from __future__ import annotations

import torch

from twotower_kernels.acceptance.kernel import (
    LOWEST_STEP_OF,
    judge_rows_kernel,
    judge_settings,
    settle_requests_kernel,
)
from twotower_kernels.compilation import Variant
from twotower_kernels.noise.kernel import GROUP, LAUNCH
from twotower_kernels.tuning import Settings, settings

_JUDGE: list[Settings] = [
    {"WIDTH": width, "FILTER_BLOCK": block, "TARGET_PROGRAMS": programs, "num_warps": warps}
    for width, warps in ((64, 8), (128, 4), (128, 8), (256, 4), (256, 8))
    for block in (2048, 4096)
    for programs in (1056, 2112, 4224)
]
CANDIDATES: dict[str, list[Settings]] = {
    "judge_rows": _JUDGE,
    "judge_one_hot": _JUDGE,
    "settle_requests": [{"num_warps": warps} for warps in (1, 4, 8)],
}


def variants() -> list[Variant]:
    """Launches over 17 rows per request and 131,072 tokens: greedy, coupled and one-hot, with and without filters."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    modes = [("greedy", "bf16"), ("coupled", "bf16"), ("one-hot", "bf16"), ("filtered coupled", "bf16")]
    modes += [("filtered one-hot", kind) for kind in kinds]
    return [_judge_variant(mode, kind, LOWEST_STEP_OF[kinds[kind]]) for mode, kind in modes] + [
        _settle_variant(mode) for mode in ("greedy", "coupled", "one-hot")
    ]


def _judge_variant(mode: str, kind: str, lowest_step: int) -> Variant:
    chosen = settings("acceptance", judge_settings("one-hot" in mode))
    pointers = {} if mode == "greedy" else {"temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32"}
    signature = {
        "logits": f"*{kind}",
        "row_stride": "i64",
        "vocab_size": "i32",
        "draft_token_ids": "*i32",
        "cu_num_draft_tokens": "*i32",
        **({"top_k": "*i32"} if mode == "greedy" else pointers),
        "has_top_k": "i32",
        "has_top_p": "i32",
        "has_min_p": "i32",
        "seeds": "*i64",
        "positions": "*i64",
        "best_scores": "*fp32",
        "picks": "*i32",
        "maxima": "*fp32",
        "sums": "*fp32",
        "draft_scores": "*fp32",
        "num_splits": "i32",
        "tokens_per_split": "i32",
    }
    constants = dict.fromkeys(("temperature", "top_p", "min_p") if mode == "greedy" else ()) | {
        "ONE_HOT": "one-hot" in mode,
        "FILTERS": "filtered" in mode,
        "LOWEST_STEP": lowest_step,
        "WIDTH": chosen["WIDTH"],
        "FILTER_BLOCK": chosen["FILTER_BLOCK"],
    }
    return Variant(
        name=f"judge_rows {mode} {kind}",
        function=judge_rows_kernel,
        signature=signature,
        constants=constants,
        num_warps=chosen["num_warps"],
        aligned=("logits", "row_stride", "vocab_size", "tokens_per_split"),
        options=LAUNCH,
    )


def _settle_variant(mode: str) -> Variant:
    temperature = {} if mode == "greedy" else {"temperature": "*fp32"}
    chunk = settings("acceptance", judge_settings(mode == "one-hot"))["WIDTH"] * GROUP.value
    return Variant(
        name=f"settle_requests {mode}",
        function=settle_requests_kernel,
        signature={
            "draft_token_ids": "*i32",
            "cu_num_draft_tokens": "*i32",
            **temperature,
            "seeds": "*i64",
            "positions": "*i64",
            "best_scores": "*fp32",
            "picks": "*i32",
            "maxima": "*fp32",
            "sums": "*fp32",
            "draft_scores": "*fp32",
            "token_ids": "*i32",
            "num_accepted": "*i32",
            "width": "i32",
            "num_splits": "i32",
        },
        constants={"ONE_HOT": mode == "one-hot", "ROWS": 32, "SPLITS": 131072 // chunk}
        | ({} if temperature else {"temperature": None}),
        num_warps=settings("acceptance", "settle_requests")["num_warps"],
        aligned=(),
        options=LAUNCH,
    )
