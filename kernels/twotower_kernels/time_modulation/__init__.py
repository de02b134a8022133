"""RMS norm, time modulation in either order with it, a residual before it, and Mamba-2's gated norm per group."""

from twotower_kernels.time_modulation.op import (
    add_then_norm,
    gated_group_norm,
    modulate_then_norm,
    norm_then_modulate,
    rms_norm,
)

__all__ = ["add_then_norm", "gated_group_norm", "modulate_then_norm", "norm_then_modulate", "rms_norm"]
