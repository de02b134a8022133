"""Mixture of experts for few tokens: routing, and the squared-ReLU experts that tokens chose."""

from twotower_kernels.experts.op import grouped_experts, route, route_tokens
from twotower_kernels.experts.types import ExpertChoice

__all__ = ["ExpertChoice", "grouped_experts", "route", "route_tokens"]
