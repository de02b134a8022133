"""Settings that the scan may be launched with, and what is compiled ahead of time."""

from __future__ import annotations

from twotower_kernels.block_scan.kernel import MOST_TOKENS, OP, PRECISION, scan_kernel
from twotower_kernels.compilation import Variant
from twotower_kernels.tuning import Settings, settings

# `scan_kernel` for every size of the tile of tokens.
CANDIDATES: dict[str, list[Settings]] = {
    f"scan_{block_t}": [
        {"BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
        for block_p in (16, 32, 64)
        for block_n in (16, 32, 64)
        for num_warps in (2, 4, 8)
        for num_stages in (1, 2)
    ]
    for block_t in (16, MOST_TOKENS)
}


def variants() -> list[Variant]:
    """Variants launched to draft with the real model and to extend it: 64 heads of 64, state 128, 8 groups, 4 taps."""
    return [
        _variant("draft of 16, bf16", "*bf16", 16, pool=True, state=False),
        _variant("draft of 16 from copies, bf16", "*bf16", 16, state=False),
        _variant("draft of 16, fp32", "*fp32", 16, pool=True, state=False),
        _variant("draft of 17, bf16", "*bf16", 32, pool=True, state=False),
        _variant("extension by 16, bf16", "*bf16", 16, pool=True),
        _variant("extension by 16 of neighbours, bf16", "*bf16", 16),
        _variant("ragged extension by 17, bf16", "*bf16", 32, ragged=True, pool=True),
        _variant("ragged extension by 17, fp32", "*fp32", 32, ragged=True, pool=True),
        _variant("replay of 17, bf16", "*bf16", 32, ragged=True, output=False),
    ]


def _variant(
    name: str,
    dtype: str,
    block_t: int,
    ragged: bool = False,
    pool: bool = False,
    output: bool = True,
    state: bool = True,
) -> Variant:
    chosen = settings(OP, f"scan_{block_t}")
    signature = dict.fromkeys(("u", "delta", "conv_state", "conv_weight", "conv_bias"), dtype)
    signature |= dict.fromkeys(("ssm_state", "a_log", "d", "dt_bias"), "*fp32")
    given = {"query_lens": "*i64", "slots": "*i64", "y": "*fp32", "new_conv": dtype, "new_ssm": "*fp32"}
    absent = {"query_lens": not ragged, "slots": not pool}
    absent |= {"y": not output, "new_conv": not state, "new_ssm": not state}
    signature |= {pointer: kind for pointer, kind in given.items() if not absent[pointer]}
    # Widths 10304, 6144 and 4096 and their multiples; also where the parts of a projection begin.
    strides: tuple[str, ...] = ("u_request_stride", "u_stride", "delta_request_stride", "delta_stride", "conv_stride")
    strides += ("conv_request_stride", "y_request_stride", "ssm_request_stride")
    strides += ("new_ssm_request_stride", "tap_stride")
    aligned = (*(name for name in signature if name not in ("query_lens", "slots")), *strides)
    signature |= dict.fromkeys((*strides, "first_token", "num_tokens"), "i32")
    return Variant(
        name=f"scan_kernel, {name}",
        function=scan_kernel,
        signature=signature,
        constants={
            **{pointer: None for pointer, is_absent in absent.items() if is_absent},
            "weight_stride": 1,
            "TAPS": 4,
            "HEADS": 64,
            "GROUPS": 8,
            "HEAD_DIM": 64,
            "STATE": 128,
            "ALIGNED": True,
            "PRECISION": PRECISION,
            "BLOCK_T": block_t,
            "BLOCK_P": chosen["BLOCK_P"],
            "BLOCK_N": chosen["BLOCK_N"],
        },
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
        aligned=aligned,
    )
