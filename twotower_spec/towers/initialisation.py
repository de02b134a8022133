"""Random weights for training from scratch, tests and benchmarks."""

import math

import torch
from torch import Tensor

from twotower_spec.towers.model import TwoTowers


@torch.no_grad()
def initialise_(towers: TwoTowers, seed: int = 0) -> None:
    """Fills all weights: matrices normal with standard deviation 1 / sqrt(inputs), Mamba and time tables as published.

    The denoiser's layers start unmodulated: shift and scale near 0, gates near 1.

    Args:
        towers: on any device; float values are drawn on the CPU with a private generator.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in towers.checkpoint_tensors():
        tensor.copy_(_initial(name, tuple(tensor.shape), generator))


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return torch.ones(shape)
    if name.endswith((".bias", "e_score_correction_bias")):
        return torch.zeros(shape)
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(1, 16, generator=generator).log()
    if name.endswith("dt_bias"):
        low, high = math.log(1e-3), math.log(1e-1)
        step = torch.empty(shape).uniform_(low, high, generator=generator).exp()
        return step + torch.log(-torch.expm1(-step))  # inverse of softplus
    if name.startswith("scale_shift_tables"):
        return 0.02 * torch.randn(shape, generator=generator) + torch.tensor([[0.0], [0.0], [1.0]])
    fan_in = shape[-1] if not name.startswith("t_block") else 100 * shape[-1]
    return torch.randn(shape, generator=generator) / math.sqrt(fan_in)
