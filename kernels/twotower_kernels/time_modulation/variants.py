"""Settings that norms, modulation and gates may be launched with, and what is compiled ahead of time."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from twotower_kernels.compilation import Variant
from twotower_kernels.time_modulation.kernel import (
    LAUNCH,
    MODULATE_THEN_NORM,
    NORM,
    NORM_THEN_MODULATE,
    OP,
    gated_group_norm_kernel,
    norm_kernel,
)
from twotower_kernels.tuning import Settings, settings

CANDIDATES: dict[str, list[Settings]] = {
    "norm": [{"num_warps": warps, "num_stages": 1} for warps in (4, 8, 16)],
    "gated_group_norm": [{"num_warps": warps, "num_stages": 1} for warps in (1, 2, 4)],
}

# Of the released model: the residual stream, and a group of a Mamba-2 layer's channels.
HIDDEN_SIZE, GROUP_WIDTH = 2688, 512

# Triton types of a model's weights and of its residual stream.
MODELS = (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"))


# What the residual stream gets before its norm: nothing in a tower's first layer, a layer's output in the others, which
# the denoiser gates.
UNGATED, GATED = "add, ", "gate, add, "
# Of an expert layer: before any layer but another one, and in the final norm.
UNGATED_EXPERTS, GATED_EXPERTS = "sum experts, add, ", "sum experts, gate, add, "
TOP_K = 6


def variants() -> list[Variant]:
    """Each kernel for the models that are served."""
    orders = (NORM, MODULATE_THEN_NORM, NORM_THEN_MODULATE)
    kinds = [("", order) for order in orders] + [(UNGATED, NORM)] + [(GATED, order) for order in orders]
    kinds += [(UNGATED_EXPERTS, NORM), (GATED_EXPERTS, NORM), (GATED_EXPERTS, MODULATE_THEN_NORM)]
    return [
        *(_norm_variant(added, order, model, stream) for added, order in kinds for model, stream in MODELS),
        *(_gated_group_norm_variant(model) for model in ("bf16", "fp32")),
    ]


def _norm_variant(added: str, order: str, model: str, stream: str) -> Variant:
    normed = stream if order == NORM else model
    modulated = stream if order == MODULATE_THEN_NORM else normed
    modulation = {} if order == NORM else dict.fromkeys(("shift", "scale_plus_one"), f"*{model}")
    branch = {"branch": f"*{model}", "total": f"*{stream}"} if added else {}
    gate = {"gate": f"*{model}"} if added in (GATED, GATED_EXPERTS) else {}
    experts = {}
    if added in (UNGATED_EXPERTS, GATED_EXPERTS):
        experts = {"expert_weights": "*fp64", "shared": f"*{model}"}
    given = modulation | branch | gate | experts
    optional = {"branch", "expert_weights", "shared", "gate", "total", "shift", "scale_plus_one"}
    return _variant(
        f"{added}{order}: {model}, stream {stream}",
        norm_kernel,
        {"x": f"*{stream}", "weight": f"*{model}", "out": f"*{normed}", "eps": "fp32"} | given,
        ("x_stride", "branch_stride", "gate_stride", "shift_stride", "scale_stride"),
        dict.fromkeys(optional - given.keys())
        | {"ORDER": order, "PRODUCT_DTYPE": tl.dtype(model), "NORM_DTYPE": tl.dtype(normed)}
        | {"MODULATED_DTYPE": tl.dtype(modulated), "HIDDEN": HIDDEN_SIZE}
        | {"BLOCK": triton.next_power_of_2(HIDDEN_SIZE), "TOP_K": TOP_K if experts else 0},
        settings(OP, "norm"),
    )


def _gated_group_norm_variant(model: str) -> Variant:
    return _variant(
        f"gated group norm: {model}",
        gated_group_norm_kernel,
        {"scanned": "*fp32", "gate": f"*{model}", "weight": f"*{model}", "out": f"*{model}", "eps": "fp32"},
        ("scanned_stride", "gate_stride"),
        {"DTYPE": tl.dtype(model), "WIDTH": GROUP_WIDTH, "BLOCK": triton.next_power_of_2(GROUP_WIDTH)},
        settings(OP, "gated_group_norm"),
    )


def _variant(
    name: str,
    function: Any,
    signature: dict[str, str],
    strides: tuple[str, ...],
    constants: dict[str, Any],
    chosen: Settings,
) -> Variant:
    """A variant with strides that are multiples of 16, and the settings of its launch."""
    blocks = {key: value for key, value in chosen.items() if key not in ("num_warps", "num_stages")}
    counts = {"num_tokens": "i32"} if "num_tokens" in function.arg_names else {}
    return Variant(
        name,
        function,
        signature | dict.fromkeys(strides, "i32") | counts,
        constants | blocks,
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
        aligned=(*(key for key, kind in signature.items() if kind.startswith("*")), *strides),
        options=LAUNCH,
    )
