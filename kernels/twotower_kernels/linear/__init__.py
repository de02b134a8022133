"""Products of a few tokens with a weight matrix, and the activation between two of them."""

from twotower_kernels.linear.op import linear, squared_relu

__all__ = ["linear", "squared_relu"]
