"""Random weights for training from scratch, tests and benchmarks."""

import math

import torch
from torch import Tensor

from twotower_kernels.experts import float_shape
from twotower_spec.checkpoint.quantised import store, weight_of_scale
from twotower_spec.towers.model import TwoTowers


@torch.no_grad()
def initialise_(towers: TwoTowers, seed: int = 0) -> None:
    """Fills all weights: matrices normal with standard deviation 1 / sqrt(inputs), Mamba and time tables as published.

    The denoiser's layers start unmodulated: shift and scale near 0, gates near 1. Values are drawn where the weights
    are, by a private generator of each device, so that a kind of device has weights of its own for a seed.

    Args:
        towers: on any device, or on two.
        seed: of the generator on the first device; the next one has the next seed.
    """
    generators: dict[torch.device, torch.Generator] = {}
    tensors = dict(towers.checkpoint_tensors())
    for name, tensor in tensors.items():
        if weight_of_scale(name) is not None:
            continue
        device = tensor.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed + len(generators))
        store(tensors, name, _initial(name, float_shape(tensor), generators[device]))


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    device = generator.device
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return torch.ones(shape, device=device)
    if name.endswith((".bias", "e_score_correction_bias")):
        return torch.zeros(shape, device=device)
    if name.endswith("A_log"):
        return torch.empty(shape, device=device).uniform_(1, 16, generator=generator).log()
    if name.endswith("dt_bias"):
        low, high = math.log(1e-3), math.log(1e-1)
        step = torch.empty(shape, device=device).uniform_(low, high, generator=generator).exp()
        return step + torch.log(-torch.expm1(-step))  # inverse of softplus
    if name.startswith("scale_shift_tables"):
        table = 0.02 * torch.randn(shape, generator=generator, device=device)
        table[2] += 1
        return table
    fan_in = shape[-1] if not name.startswith("t_block") else 100 * shape[-1]
    return torch.randn(shape, generator=generator, device=device) / math.sqrt(fan_in)
