"""Counter-based noise: a pure function of seed, position, draw and token id."""

from twotower_kernels.noise.op import gumbel_noise, uniform_noise

__all__ = ["gumbel_noise", "uniform_noise"]
