"""One denoising step after the logits: picks, their confidence, and which of them are committed."""

from twotower_kernels.unmasking.op import choose_commits, pick_tokens

__all__ = ["choose_commits", "pick_tokens"]
