"""Products of a few tokens with a weight matrix."""

from twotower_kernels.linear.op import linear

__all__ = ["linear"]
