"""Prepares a process for vLLM's model runner V2 on a CPU, with asynchronous scheduling as on a device.

A plugin of vLLM: whatever process has this folder on its path is prepared, a server's engine and every rank too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def install() -> None:
    """Mends a fault of Triton 3.9's interpreter, and lets vLLM schedule asynchronously on a CPU."""
    from triton.runtime.interpreter import InterpreterBuilder
    from vllm.platforms.cpu import CpuPlatform

    from vllm_twotower.compat import wrap_once

    wrap_once(InterpreterBuilder, "create_masked_load", _with_boolean_mask(1))
    wrap_once(InterpreterBuilder, "create_masked_store", _with_boolean_mask(2))
    stock = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        decided = vllm_config.scheduler_config.async_scheduling
        stock(vllm_config)  # switches it off
        if vllm_config.use_v2_model_runner:
            vllm_config.scheduler_config.async_scheduling = decided

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _with_boolean_mask(place: int) -> Callable[[Any], Any]:
    """Makes a wrapper of loads or stores, which refuse a mask that is int32: one that was broadcast, or computed.

    Args:
        place: of the mask among the arguments.
    """
    from triton.runtime.interpreter import TensorHandle

    def wrapper(stock: Any) -> Any:
        @wraps(stock)
        def masked(self: Any, *given: Any, **named: Any) -> Any:
            mask = given[place]
            boolean = TensorHandle(mask.data.astype(bool), mask.dtype)
            return stock(self, *given[:place], boolean, *given[place + 1 :], **named)

        return masked

    return wrapper
