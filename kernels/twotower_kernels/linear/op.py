"""`x @ weight.T`, in the order of operands that is fastest where it runs, squared ReLU, and the MLP made of both."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_kernels.backend import use_triton

# With more tokens than this the usual order of operands is faster again.
MOST_TOKENS_ON_THE_RIGHT = 512


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Product of tokens with a weight matrix, for a few tokens at a time.

    bfloat16 on a CPU with AMX: oneDNN takes 0.6 to 0.75 of the time when the weight is the left operand, at 2 to 64
    tokens, and a matrix-vector product does as much for one token; with AVX-512 alone both take up to four times as
    long. Everywhere else this is `torch.nn.functional.linear`.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features], any strides.

    Returns:
        [..., out_features].
    """
    both_bfloat16 = x.dtype == weight.dtype == torch.bfloat16  # under autocast only `linear` makes them so
    if not both_bfloat16 or x.device.type != "cpu" or not has_amx() or x.requires_grad or weight.requires_grad:
        return F.linear(x, weight)
    tokens = x.flatten(0, -2) if x.dim() > 1 else x[None]
    if tokens.shape[0] > MOST_TOKENS_ON_THE_RIGHT:
        return F.linear(x, weight)
    if tokens.shape[0] == 1:
        return torch.mv(weight, tokens[0]).view(*x.shape[:-1], weight.shape[0])
    return torch.mm(weight, tokens.t()).t().reshape(*x.shape[:-1], weight.shape[0])


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`down(relu(up(x))^2)`: two products, and the activation between them.

    Args:
        x: [..., hidden].
        up: [width, hidden], any strides.
        down: [hidden, width], any strides.

    Returns:
        [..., hidden].
    """
    return linear(squared_relu(linear(x, up)), down)


def squared_relu(x: Tensor) -> Tensor:
    """`relu(x)^2`, number by number.

    Args:
        x: [..., features], any strides; the kernel copies what is not contiguous.

    Returns:
        [..., features] in the dtype of `x`.
    """
    if use_triton(x) and x.dtype != torch.float64:
        from twotower_kernels.linear.kernel import launch_squared_relu

        return launch_squared_relu(x)
    return x.relu().square()


@cache
def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in tiles."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private in torch 2.13
    return supported is not None and bool(supported())
