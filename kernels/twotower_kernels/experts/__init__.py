"""Mixture of experts for few tokens: routing, and the squared-ReLU experts that tokens chose."""

from twotower_kernels.experts.op import grouped_experts, route, route_tokens

__all__ = ["grouped_experts", "route", "route_tokens"]
