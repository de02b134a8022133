"""RMS norm, time modulation in either order with it, the gated residual, and Mamba-2's gated norm per group."""

from twotower_kernels.time_modulation.op import (
    gated_group_norm,
    gated_residual,
    modulate_then_norm,
    norm_then_modulate,
    rms_norm,
)

__all__ = ["gated_group_norm", "gated_residual", "modulate_then_norm", "norm_then_modulate", "rms_norm"]
