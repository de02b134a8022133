"""Rounding of matrix products on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Switches of torch.backends.cuda.matmul: whether cuBLAS may add up the parts of a product in the operands' dtype.
_SWITCHES = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}


@contextmanager
def rounded_once(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Has cuBLAS add up parts of a product in float32, so that a token's rounds alike alone and beside others.

    For few tokens cuBLAS splits the inner dimension, and PyTorch lets it round every part. The switch is the process's:
    it is set back at the end, as a verifier in the same process has to round as it does without a drafter.

    Args:
        device: that products are made on; only CUDA has the switch.
        dtype: of operands; one of 32 or 64 bits is summed in itself anyway.
    """
    name = _SWITCHES.get(dtype)
    if name is None or device.type != "cuda":
        yield
        return
    switches = torch.backends.cuda.matmul
    allowed, splits = getattr(switches, name), getattr(switches, f"{name}_split_k", None)
    # Newer versions of PyTorch have a second part, whether the inner dimension may be split at all.
    setattr(switches, name, False if splits is None else (False, splits))
    try:
        yield
    finally:
        setattr(switches, name, allowed if splits is None else (allowed, splits))
