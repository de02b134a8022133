"""Products of a few tokens with a weight matrix, their rounding, and the activation between two of them."""

from twotower_kernels.linear.op import linear, mlp, squared_relu
from twotower_kernels.linear.rounding import rounded_once

__all__ = ["linear", "mlp", "rounded_once", "squared_relu"]
