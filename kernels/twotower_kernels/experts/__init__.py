"""Mixture of experts for few tokens: routing, and the squared-ReLU experts that tokens chose."""

from twotower_kernels.experts.op import grouped_experts, route, route_tokens
from twotower_kernels.experts.quantisation import quantise
from twotower_kernels.experts.types import ExpertChoice, ExpertScales

__all__ = ["ExpertChoice", "ExpertScales", "grouped_experts", "quantise", "route", "route_tokens"]
