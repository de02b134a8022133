"""Hooks in vLLM's model runner V2 that the speculator needs, installed only in worker processes that draft."""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.v1.worker.gpu import model_runner

from twotower_spec.errors import ArgumentError
from vllm_twotower import compat
from vllm_twotower.drafter import announcing_steps
from vllm_twotower.hook_table import hooks_of
from vllm_twotower.runner import VARIABLE, drafts_on_v2
from vllm_twotower.v2.sampler import TwoTowerRejectionSampler, TwoTowerSampler


def install() -> None:
    """Wraps two methods of the runner and replaces both samplers in its module, once.

    The speculator is made in the runner's constructor, before the runner loads its model and makes its samplers.

    Raises:
        ArgumentError: this vLLM lacks a place that drafting needs.
    """
    missing = compat.missing_hooks(hooks_of("v2"))
    if missing:
        raise ArgumentError(f"{compat.warning_text(missing)} Set {VARIABLE}=0, with which vLLM takes model runner V1.")
    runner_class = model_runner.GPUModelRunner
    compat.wrap_once(runner_class, "load_model", loading_drafter)
    compat.wrap_once(runner_class, "execute_model", announcing_steps("speculator"))
    compat.wrap_once(model_runner, "Sampler", _making_sampler)
    compat.wrap_once(model_runner, "RejectionSampler", _making_rejection_sampler)


def loading_drafter(stock: Any) -> Any:
    """Loads our drafter after the verifier, so that its memory counts among the weights."""

    @wraps(stock)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if drafts_on_v2(self.speculative_config) and self.speculator is not None:
            with DeviceMemoryProfiler() as used:
                self.speculator.load(self.device, self.dtype)
            self.model_memory_usage += used.consumed_memory

    return load_model


def _making_sampler(stock: Any) -> Any:
    @wraps(stock, updated=())
    def make(**given: Any) -> Any:
        ours = drafts_on_v2(given["vllm_config"].speculative_config)
        return (TwoTowerSampler if ours else stock)(**given)

    return make


def _making_rejection_sampler(stock: Any) -> Any:
    @wraps(stock, updated=())
    def make(sampler: Any, *args: Any, **kwargs: Any) -> Any:
        ours = isinstance(sampler, TwoTowerSampler)
        return (TwoTowerRejectionSampler if ours else stock)(sampler, *args, **kwargs)

    return make
