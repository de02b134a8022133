"""One denoising step after the logits: picks, their confidence, and which of them are committed."""

from twotower_kernels.unmasking.op import choose_commits, pick_tokens, unmask
from twotower_kernels.unmasking.types import PickNoise, Unmasked

__all__ = ["PickNoise", "Unmasked", "choose_commits", "pick_tokens", "unmask"]
