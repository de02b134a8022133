"""Counter-based noise, a pure function of seed, position, draw and token id, and samples drawn with it."""

from twotower_kernels.noise.op import gumbel_argmax, gumbel_noise, reproducible_log, uniform_noise

__all__ = ["gumbel_argmax", "gumbel_noise", "reproducible_log", "uniform_noise"]
