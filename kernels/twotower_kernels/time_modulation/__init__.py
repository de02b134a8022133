"""RMS norm, time modulation in either order with it, and the gated residual."""

from twotower_kernels.time_modulation.op import gated_residual, modulate_then_norm, norm_then_modulate, rms_norm

__all__ = ["gated_residual", "modulate_then_norm", "norm_then_modulate", "rms_norm"]
