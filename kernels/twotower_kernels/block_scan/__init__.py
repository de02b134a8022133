"""A block of Mamba-2 tokens from a seeded state, convolution included, and replay of an accepted prefix."""

from twotower_kernels.block_scan.long_scan import (
    LongScan,
    choose_long_scan,
    mamba_ssm_scan,
    register_long_scan,
    scan_with,
    varlen_scan,
)
from twotower_kernels.block_scan.op import block_scan, pool_scan, replay_scan, sequence_scan, warm_up
from twotower_kernels.block_scan.types import ScanWeights

__all__ = [
    "LongScan",
    "ScanWeights",
    "block_scan",
    "choose_long_scan",
    "mamba_ssm_scan",
    "pool_scan",
    "register_long_scan",
    "replay_scan",
    "scan_with",
    "sequence_scan",
    "varlen_scan",
    "warm_up",
]
