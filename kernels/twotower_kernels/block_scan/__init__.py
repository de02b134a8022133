"""A block of Mamba-2 tokens from a seeded state, convolution included, and replay of an accepted prefix."""

from twotower_kernels.block_scan.op import ScanWeights, block_scan, replay_scan, sequence_scan

__all__ = ["ScanWeights", "block_scan", "replay_scan", "sequence_scan"]
