"""One denoising step after the logits: picks, their confidence, and which of them are committed."""

from twotower_kernels.unmasking.op import PickNoise, Unmasked, choose_commits, pick_tokens, unmask

__all__ = ["PickNoise", "Unmasked", "choose_commits", "pick_tokens", "unmask"]
