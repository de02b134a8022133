"""Makes vLLM's model runner V2 take our drafter where settings name it, and never its own n-gram in its place."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from functools import wraps
from typing import Any

from vllm_twotower import compat, hook_table
from vllm_twotower.runner import DRAFTS_ON_V2, drafts_on_v2


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
    install_scheduler()


def install_scheduler() -> None:
    """Lets the scheduler of this process plan as many drafts as the drafter wants, where one drafts on V2.

    Importing the scheduler takes time, which other processes are spared.
    """
    if os.environ.get(DRAFTS_ON_V2) != "1":
        return
    with contextlib.suppress(ImportError, AttributeError):
        scheduler = importlib.import_module(hook_table.SCHEDULER).Scheduler
        compat.wrap_once(scheduler, "__init__", _planning_with_the_drafter)


def _planning_with_the_drafter(stock: Any) -> Any:
    """Has every step make as many drafts as pay, none at all where none does.

    vLLM looks up their number by batch size in a table that the user may give; ours stands in its place. With data
    parallelism there is none, for ranks must not differ.
    """

    @wraps(stock)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, vllm_config, *args, **kwargs)
        parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
        if not drafts_on_v2(speculative) or parallel.data_parallel_size > 1:
            return
        from vllm_twotower.metrics import PlannedDrafts
        from vllm_twotower.requirements import configuration_of
        from vllm_twotower.stats_folder import stats_path

        if configuration_of(vllm_config)[0].policy not in ("adaptive", "off"):
            return  # always as many, for which vLLM has graphs and pads new requests
        path = stats_path(int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)))
        self.dynamic_sd_lookup = PlannedDrafts(path, speculative.num_speculative_tokens, self.dynamic_sd_lookup)

    return init


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
