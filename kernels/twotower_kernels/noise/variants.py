"""Settings that sampling with noise may be launched with, and what is compiled ahead of time."""

from __future__ import annotations

from twotower_kernels.compilation import Variant
from twotower_kernels.noise.kernel import LAUNCH, gumbel_argmax_kernel
from twotower_kernels.tuning import Settings, settings

CANDIDATES: dict[str, list[Settings]] = {
    "gumbel_argmax": [{"WIDTH": width, "num_warps": warps} for width in (128, 256) for warps in (4, 8)]
}


def variants() -> list[Variant]:
    """Variants that launches over float32 and bfloat16 scores compile."""
    chosen = settings("noise", "gumbel_argmax")
    return [
        Variant(
            name=f"gumbel_argmax {kind}",
            function=gumbel_argmax_kernel,
            signature={
                "scores": f"*{kind}",
                "row_stride": "i64",
                "vocab_size": "i32",
                "seeds": "*i64",
                "positions": "*i64",
                "draw": "i32",
                "picks": "*i64",
            },
            constants={"WIDTH": chosen["WIDTH"]},
            num_warps=chosen["num_warps"],
            options=LAUNCH,
        )
        for kind in ("fp32", "bf16")
    ]
