"""Weights of 8 bits with one scale per output channel, made from wider ones and back."""

import torch
from torch import Tensor

# Largest number of each dtype that weights are quantised to; int8 has as many below 0 as above.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def quantise(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds a weight to 8 bits, such that the largest element of each output channel is the largest number there is.

    Args:
        weight: [..., out, in], floats.
        dtype: float8_e4m3fn or int8.

    Returns:
        The rounded weight in `dtype`, and scales float32 [..., out] by which it is to be multiplied.
    """
    wide, most = weight.float(), LARGEST[dtype]
    largest = wide.abs().amax(-1)
    scales = torch.where(largest == 0, 1.0, largest / most)
    scaled = (wide / scales[..., None]).clamp(-most, most)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def dequantise(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies a quantised weight [..., out, in] by its scales [..., out]; rounded once, to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.to(wide) * scales.to(wide)[..., None]).to(dtype)
