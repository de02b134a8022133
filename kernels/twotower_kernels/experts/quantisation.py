"""Weights of 8 bits with a scale per output channel, of 4 with one per group of inputs; made from floats and back."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest number of each dtype of 8 bits; int8 has as many below 0 as above.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Weights of 4 bits lie two in a byte, that of the even input in the lower half, as numbers from 0 to 15: 8 more than
# they are. So many inputs share a scale.
FOUR_BITS, GROUP_SIZE = torch.uint8, 64
QUANTISED_DTYPES = (*LARGEST, FOUR_BITS)


def quantised_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a quantised weight and its scales.

    Args:
        shape: of the weight in floats, [..., out, in]; `in` is even for 4 bits.
        dtype: one of `QUANTISED_DTYPES`.
    """
    if dtype != FOUR_BITS:
        return shape, shape[:-1]
    *outer, num_inputs = shape
    return (*outer, num_inputs // 2), (*outer, -(-num_inputs // GROUP_SIZE))


def scales_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the scales of a quantised weight: many scales are stored in fewer bits."""
    return torch.bfloat16 if dtype == FOUR_BITS else torch.float32


def float_shape(weight: Tensor) -> tuple[int, ...]:
    """Shape in floats of a weight, quantised or not."""
    *outer, last = weight.shape
    return (*outer, 2 * last if weight.dtype == FOUR_BITS else last)


def quantise(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds a weight to 8 or 4 bits.

    The largest element of each output channel, or group of inputs, becomes the largest number there is. Of 4 bits that
    is -8, whatever the element's sign, as there is no 8: scales of groups have signs.

    Args:
        weight: [..., out, in], floats.
        dtype: one of `QUANTISED_DTYPES`.

    Returns:
        The rounded weight and its scales, as `quantised_shapes` and `scales_dtype` have them.

    Source: of 4 bits, Q4_0 of llama.cpp, in groups twice as large.
    """
    wide = weight.float()
    if dtype == FOUR_BITS:
        return _quantise_groups(wide)
    most = LARGEST[dtype]
    largest = wide.abs().amax(-1)
    scales = torch.where(largest == 0, 1.0, largest / most)
    scaled = (wide / scales[..., None]).clamp(-most, most)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def dequantise(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies a quantised weight by its scales; [..., out, in], rounded once, to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if weight.dtype != FOUR_BITS:
        return (weight.to(wide) * scales.to(wide)[..., None]).to(dtype)
    numbers = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(-2).to(wide) - 8
    per_input = scales.to(wide).repeat_interleave(GROUP_SIZE, dim=-1)[..., : numbers.shape[-1]]
    return (numbers * per_input).to(dtype)


def _quantise_groups(wide: Tensor) -> tuple[Tensor, Tensor]:
    num_inputs = wide.shape[-1]
    groups = F.pad(wide, (0, -num_inputs % GROUP_SIZE)).unflatten(-1, (-1, GROUP_SIZE))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest / -8).to(scales_dtype(FOUR_BITS))
    scales = torch.where(scales == 0, 1.0, scales)
    numbers = (groups / scales.float()).round().clamp(-8, 7) + 8
    numbers = numbers.flatten(-2)[..., :num_inputs].to(FOUR_BITS)
    return numbers[..., ::2] | numbers[..., 1::2] << 4, scales[..., 0]
