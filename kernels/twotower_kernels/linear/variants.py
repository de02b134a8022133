"""Settings that the activation may be launched with, and what is compiled ahead of time."""

from __future__ import annotations

from twotower_kernels.compilation import Variant
from twotower_kernels.linear.kernel import OP, squared_relu_kernel
from twotower_kernels.tuning import Settings, settings

CANDIDATES: dict[str, list[Settings]] = {
    "squared_relu": [
        {"BLOCK": block, "num_warps": warps, "num_stages": 1} for block in (512, 1024, 2048) for warps in (2, 4, 8)
    ]
}

# Of the released model: the shared expert of an expert layer.
SHARED_WIDTH = 3712


def variants() -> list[Variant]:
    """The kernel for the models that are served."""
    chosen = settings(OP, "squared_relu")
    return [
        Variant(
            f"squared_relu {kind}",
            squared_relu_kernel,
            {"x": f"*{kind}", "out": f"*{kind}"},
            {"WIDTH": SHARED_WIDTH, "BLOCK": chosen["BLOCK"]},
            num_warps=chosen["num_warps"],
            num_stages=chosen["num_stages"],
        )
        for kind in ("bf16", "fp32")
    ]
