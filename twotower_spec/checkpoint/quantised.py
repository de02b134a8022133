"""Quantised experts in a checkpoint: their names and dtypes, and how they are made from floats while these are read."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from twotower_kernels.experts import FOUR_BITS, quantise

# Dtypes of quantised experts by the names that safetensors gives them.
STORED_EXPERT_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": FOUR_BITS}
_SCALE = "_scale"
_EXPERT = re.compile(r"\.experts\.\d+\.(up|down)_proj\.weight")


def may_be_quantised(name: str) -> bool:
    """Whether a tensor is the weight of a routed expert."""
    return _EXPERT.search(name) is not None and not name.endswith(_SCALE)


def is_quantised(dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype are nothing without their scales."""
    return dtype in STORED_EXPERT_DTYPES.values()


def scale_name(name: str) -> str:
    """Name of the scales of a quantised weight."""
    return name + _SCALE


def weight_of_scale(name: str) -> str | None:
    """Name of the weight that a tensor scales; None for a tensor that is no scales."""
    weight = name.removesuffix(_SCALE)
    return weight if weight != name and may_be_quantised(weight) else None


def store(destinations: Mapping[str, Tensor], name: str, values: Tensor, rows: slice | None = None) -> None:
    """Copies values into their destination; floats for quantised weights are rounded, and give them their scales.

    Args:
        destinations: of all tensors, by published name; any dtypes and devices.
        name: of the tensor.
        values: its content.
        rows: along its first axis, those that the values are; None for all.
    """
    destination, within = destinations[name], ... if rows is None else rows
    if is_quantised(destination.dtype) and not is_quantised(values.dtype):
        values, scales = quantise(values.to(destination.device), destination.dtype)
        destinations[scale_name(name)][within].copy_(scales)
    destination[within].copy_(values)
