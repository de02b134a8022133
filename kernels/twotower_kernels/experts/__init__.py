"""Mixture of experts for few tokens: routing, and the squared-ReLU experts that tokens chose."""

from twotower_kernels.experts.op import expert_outputs, grouped_experts, route, route_tokens
from twotower_kernels.experts.quantisation import (
    FOUR_BITS,
    dequantise,
    float_shape,
    quantise,
    quantised_shapes,
    scales_dtype,
)
from twotower_kernels.experts.types import ExpertChoice, ExpertOutputs, ExpertScales, SharedExpert

__all__ = [
    "FOUR_BITS",
    "ExpertChoice",
    "ExpertOutputs",
    "ExpertScales",
    "SharedExpert",
    "dequantise",
    "expert_outputs",
    "float_shape",
    "grouped_experts",
    "quantise",
    "quantised_shapes",
    "route",
    "route_tokens",
    "scales_dtype",
]
