"""Settings that launches of a denoising step may take, and what is compiled ahead of time."""

from __future__ import annotations

import triton

from twotower_kernels.compilation import Variant
from twotower_kernels.noise.kernel import GROUP, LAUNCH
from twotower_kernels.tuning import Settings, settings
from twotower_kernels.unmasking.kernel import unmask_kernel, width_of

_TRIED: list[Settings] = [
    {"WIDTH_BYTES": width, "TARGET_PROGRAMS": programs, "num_warps": warps, "maxnreg": registers}
    for width, warps, registers in ((256, 4, 168), (256, 8, 128), (512, 8, 128), (512, 8, 168), (512, 16, 128))
    for programs in (264, 528, 1056, 2112)
]
CANDIDATES: dict[str, list[Settings]] = {"unmask": _TRIED, "pick_tokens": _TRIED}


def variants() -> list[Variant]:
    """Launches over blocks of 16 positions and a vocabulary of 131,072: greedy, sampled and with picks given."""
    steps = [("greedy", "bf16"), ("greedy", "fp16"), ("greedy", "fp32"), ("sampled", "bf16"), ("sampled", "fp32")]
    return [
        *(_variant(mode, kind) for mode, kind in [*steps, ("filtered", "bf16")]),
        _variant("greedy", "bf16", schedules=True),
        _variant("greedy", "bf16", picks_alone=True),
        _variant("sampled", "bf16", picks_alone=True),
    ]


def _variant(mode: str, kind: str, schedules: bool = False, picks_alone: bool = False) -> Variant:
    kernel = "pick_tokens" if picks_alone else "unmask"
    chosen = settings("unmasking", kernel)
    blocks = {
        "positions": "*i64",
        "token_ids": "*i64",
        "masked": "*i1",
        "confidence": "*fp32",
        "commits": "*i1",
        "block_size": "i32",
    }
    sampling = {"temperature": "fp32", "seeds": "*i64", "first_positions": "*i64"}
    absent: dict[str, int | None] = {}
    if picks_alone:
        absent |= dict.fromkeys(blocks) | {"block_size": 1}
    if not schedules:
        absent |= {"threshold_of": None, "steps_of": None}
    if mode == "greedy":
        absent |= dict.fromkeys(sampling)
    if mode != "filtered":
        absent["given_picks"] = None
    signature = {
        "logits": f"*{kind}",
        "row_stride": "i32",
        "num_rows": "i32",
        "vocab_size": "i32",
        "num_token_ids": "i32",
        "mask_token_id": "i32",
        "given_picks": "*i64",
        "draw": "i32",
        "confidence_threshold": "fp32",
        "remaining_steps": "i32",
        "threshold_of": "*fp32",
        "steps_of": "*i32",
        "parts": "*fp32",
        "picks": "*i32",
        "counters": "*i32",
        "new_token_ids": "*i64",
        "new_confidence": "*fp32",
        "num_reqs": "i32",
        "num_splits": "i32",
        "chunks_per_split": "i32",
        **blocks,
        **sampling,
    }
    signature = {name: kind for name, kind in signature.items() if name not in absent}
    pointers = (name for name, type_name in signature.items() if type_name.startswith("*"))
    numbers = (name for name in ("row_stride", "vocab_size", "block_size") if name in signature)
    width = width_of(chosen, 4 if kind == "fp32" else 2)
    positions, splits = 1 if picks_alone else 16, triton.next_power_of_2(131072 // (width * GROUP.value))
    name = " ".join([kernel, mode, kind, *(["per row"] if schedules else [])])
    return Variant(
        name=name,
        function=unmask_kernel,
        signature=signature,
        constants=absent | {"WIDTH": width, "POSITIONS": positions, "SPLITS": splits},
        num_warps=chosen["num_warps"],
        aligned=(*pointers, *numbers),
        options=LAUNCH | {"maxnreg": chosen["maxnreg"]},
    )
