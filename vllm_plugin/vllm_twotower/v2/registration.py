"""Makes vLLM's model runner V2 take our drafter where settings name it, and never its own n-gram in its place."""

from __future__ import annotations

import contextlib
import importlib
import sys
from functools import wraps
from typing import Any

from vllm_twotower import compat, hook_table
from vllm_twotower.runner import drafts_on_v2


def install() -> None:
    """Wraps two functions of vLLM, once per process; a vLLM without them has no V2 for us, which routing says."""
    with contextlib.suppress(ImportError, AttributeError):
        config = importlib.import_module(hook_table.SPECULATIVE).SpeculativeConfig
        compat.wrap_once(config, "use_ngram_gpu", _not_for_ours)
    with contextlib.suppress(ImportError, AttributeError):
        package = importlib.import_module(hook_table.SPECULATORS)
        compat.wrap_once(package, "init_speculator", _making_ours)
        runner = sys.modules.get(hook_table.RUNNER_V2)
        if runner is not None:  # it has taken the name from the package already
            compat.wrap_once(runner, "init_speculator", _making_ours)


def _making_ours(stock: Any) -> Any:
    @wraps(stock)
    def init_speculator(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not drafts_on_v2(vllm_config.speculative_config):
            return stock(vllm_config, *args, **kwargs)
        from vllm_twotower.v2.speculator import TwoTowerSpeculator

        return TwoTowerSpeculator(vllm_config, *args, **kwargs)

    return init_speculator


def _not_for_ours(stock: Any) -> Any:
    """V1 asks this before it makes its n-gram drafter, and refuses the method where the answer is no."""

    @wraps(stock)
    def use_ngram_gpu(self: Any) -> bool:
        return bool(stock(self)) and not drafts_on_v2(self)

    return use_ngram_gpu
