"""The only place that decides whether an op runs its Triton kernel, and on which device."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Set to "torch", this variable turns all Triton kernels off, to compare or to look for a fault.
SWITCH = "TWOTOWER_KERNELS"


def use_triton(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an op on `x` runs its Triton kernel: on CUDA, where Triton is installed, unless switched off.

    PyTorch computes whatever needs a gradient for `x` or the other arguments: no kernel has a backward pass.
    """
    return x.is_cuda and _triton_wanted() and not _wants_gradient(x, *others)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@cache
def _triton_wanted() -> bool:
    return check_switch() == "auto" and find_spec("triton") is not None


def check_switch() -> str:
    """Choice of kernels in the environment, "auto" or "torch"; a `ValueError` where it is neither."""
    chosen = os.environ.get(SWITCH, "auto")
    if chosen not in ("auto", "torch"):
        raise ValueError(f"{SWITCH}={chosen} is not allowed; give auto or torch")
    return chosen


def on_its_device(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Makes the device of the first argument current while a launcher runs: Triton launches on the current one."""

    @wraps(launch)
    def guarded(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return launch(x, *args, **kwargs)
        with torch.cuda.device_of(x):
            return launch(x, *args, **kwargs)

    return guarded
