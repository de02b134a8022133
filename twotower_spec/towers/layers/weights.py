"""Storage of weights: parameters without gradients, and views of them under the published tensor names."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

NamedTensors = Iterable[tuple[str, Tensor]]


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter; weights come from a checkpoint or from `initialise_`."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def matrix(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised weight [..., out, in] laid out for the fastest product of few tokens with it.

    In float32 on a CPU that is input-major: measured with MKL, one to 16 tokens take 0.8 to 0.95 of the time they take
    with the output-major layout where weights stream from memory, and 0.5 to 0.65 where they fit a core's cache.
    """
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        *batch, out_features, in_features = shape
        held = torch.empty((*batch, in_features, out_features), dtype=dtype, device=device).transpose(-1, -2)
    else:
        held = torch.empty(shape, dtype=dtype, device=device)
    return nn.Parameter(held, requires_grad=False)


def taps_first(channels: int, taps: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised convolution weight [channels, 1, taps]: one tap of all channels is contiguous."""
    return nn.Parameter(
        torch.empty((taps, 1, channels), dtype=dtype, device=device).permute(2, 1, 0), requires_grad=False
    )


def prefixed(prefix: str, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """The same tensors with `prefix.` in front of their names."""
    for name, tensor in tensors:
        yield f"{prefix}.{name}", tensor
