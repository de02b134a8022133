"""Prepares a process for vLLM's model runner V2 on a CPU, with asynchronous scheduling as on a device."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np

from vllm_twotower.compat import wrap_once


def prepare() -> None:
    """Mends a fault of Triton 3.9's interpreter, and lets vLLM schedule asynchronously on a CPU."""
    from triton.runtime.interpreter import InterpreterBuilder
    from vllm.platforms.cpu import CpuPlatform

    wrap_once(InterpreterBuilder, "create_masked_load", _with_boolean_mask)
    wrap_once(InterpreterBuilder, "create_masked_store", _with_boolean_mask)
    stock = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        stock(vllm_config)  # switches it off
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _with_boolean_mask(stock: Any) -> Any:
    """A mask that was broadcast from one element is int32 there, which loads and stores refuse."""
    from triton.runtime.interpreter import TensorHandle

    def as_mask(one: Any) -> Any:
        is_mask = isinstance(one, TensorHandle) and str(one.dtype.scalar) == "int1" and one.data.dtype != np.bool_
        return TensorHandle(one.data.astype(bool), one.dtype) if is_mask else one

    @wraps(stock)
    def masked(self: Any, *given: Any, **named: Any) -> Any:
        return stock(self, *map(as_mask, given), **{name: as_mask(one) for name, one in named.items()})

    return masked
