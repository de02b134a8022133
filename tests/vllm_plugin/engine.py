"""Real vLLM in a process of its own: one `LLM()` per process, so every set of engine arguments gets one.

The process calls the named scenarios of `scenarios.py` one after the other and writes what they return as JSON. Results
are kept for the test run, so that several tests can look at one engine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.vllm_plugin.fork_server import results_of
from twotower_bench.servers.forked_server import fork_workers
from twotower_spec.demo.trio import held_out_prompts, trio_path
from vllm_twotower.runner import drafter_of

# Far more blocks than all of them can fill, and far fewer than a GiB holds, which would be zeroed for every engine.
ROOMY = {"max_model_len": 512, "max_num_seqs": 10, "max_num_batched_tokens": 512, "num_gpu_blocks_override": 400}
# Prompts are read in pieces, blocks run out, and requests end at max_model_len.
TIGHT = {"max_model_len": 192, "max_num_seqs": 6, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 20}

_results: dict[str, dict[str, Any]] = {}
_ended: list[Any] = []


def two_tower(num_speculative_tokens: int | None, **knobs: Any) -> dict[str, Any]:
    """Speculative settings with the bundled TwoTower model."""
    settings: dict[str, Any] = {"model": str(trio_path("twotower")), "twotower": {"log_interval_s": 0, **knobs}}
    if num_speculative_tokens is not None:
        settings["num_speculative_tokens"] = num_speculative_tokens
    return settings


def run_engine(
    scenarios: Sequence[str],
    speculative_config: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 400,
    **engine_args: Any,
) -> dict[str, Any]:
    """Results of scenarios by name, from a fresh engine on the bundled verifier."""
    order = json.dumps(
        {"scenarios": list(scenarios), "speculative_config": speculative_config, "engine_args": engine_args},
        sort_keys=True,
    )
    key = order + json.dumps(dict(environment or {}), sort_keys=True)
    if key not in _results:
        found, log = results_of(f"{__name__}:write_results", order, environment, timeout_s)
        _results[key] = {**found, "log": log}
    return _results[key]


@dataclass
class Request:
    """One request of a run through the engine, step by step."""

    prompt: Any
    params: Any
    arrives_at: int = 0
    aborted_at: int | None = None


class Engine:
    """Parts of vLLM that scenarios use."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.core: Any = llm.llm_engine
        self._run = 0

    @cached_property
    def runner(self) -> Any:
        """Model runner of this process."""
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def drafter(self) -> Any:
        """The drafter of either model runner; None without speculation."""
        return drafter_of(self.runner)

    @property
    def session(self) -> Any:
        """The drafter's session; None without speculation."""
        return getattr(self.drafter, "session", None)

    def prompts(self, count: int) -> list[str]:
        """Held-out prompts, maths and Python in turn."""
        maths, python = held_out_prompts("maths"), held_out_prompts("python")
        return [one.prompt for pair in zip(maths, python, strict=False) for one in pair][:count]

    def params(self, **given: Any) -> Any:
        """Sampling parameters, greedy unless said."""
        from vllm import SamplingParams

        return SamplingParams(**{"temperature": 0.0, "max_tokens": 40, **given})

    def generate(self, prompts: Sequence[Any], **params: Any) -> list[list[list[int]]]:
        """Token ids per prompt and sample."""
        return [[list(one.token_ids) for one in row.outputs] for row in self.outputs(prompts, **params)]

    def outputs(self, prompts: Sequence[Any], **params: Any) -> list[Any]:
        """Results as vLLM gives them."""
        found: list[Any] = self.llm.generate(list(prompts), self.params(**params), use_tqdm=False)
        return found

    def step_through(
        self, requests: Sequence[Request], on_step: Callable[[int], None] | None = None
    ) -> dict[int, list[int]]:
        """Runs requests that come and go at given steps; token ids of those that ended by themselves."""
        finished: dict[int, list[int]] = {}
        for name, row in self.stream(requests, on_step):
            if row.finished:
                finished[name] = list(row.outputs[0].token_ids)
        return finished

    def stream(
        self, requests: Sequence[Request], on_step: Callable[[int], None] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Every output of every step, with the index of its request."""
        self._run += 1
        prefix = f"run{self._run}-"
        # Requests come and go by the number of tokens another has, because drafts change the number of steps.
        step = 0
        waiting = dict(enumerate(requests))
        while waiting or self.core.has_unfinished_requests():
            for index, request in list(waiting.items()):
                if request.arrives_at <= step:
                    self.core.add_request(prefix + str(index), request.prompt, request.params)
                    del waiting[index]
            for index, request in enumerate(requests):
                if request.aborted_at == step:
                    self.core.abort_request([prefix + str(index)])
            for row in self.core.step():
                yield int(row.request_id.removeprefix(prefix)), row
            if on_step is not None:
                on_step(step)
            step += 1

    def metric(self, name: str) -> float:
        """Value of a counter or gauge without further labels."""
        found = [one for one in self.llm.get_metrics() if one.name == name]
        return float(sum(one.value for one in found))


def end_engine(engine: Any) -> None:
    """Ends the workers of an engine that has some, before its process ends.

    It is kept all the same: else vLLM would take apart what ends anyway, which takes longer than to load it.
    """
    _ended.append(engine)
    if engine.vllm_config.parallel_config.world_size > 1:
        engine.engine_core.shutdown()


def digest(texts: Any) -> str:
    """Few letters that stand for texts, by which `python -m tests.versions` compares those of several vLLMs."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]


def is_on_v2() -> bool:
    """Whether engines of this process run vLLM's model runner V2."""
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def write_results(order: str, output: str) -> None:
    """Runs an engine in this process."""
    from vllm import LLM

    from tests.vllm_plugin import scenarios

    given = json.loads(order)
    arguments = {
        "model": str(trio_path("verifier")),
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "disable_log_stats": False,
        **given["engine_args"],
    }
    fork_workers()
    prepare = arguments.pop("prepare", None)
    if prepare:
        getattr(scenarios, prepare)()
    engine = Engine(LLM(**arguments, speculative_config=given["speculative_config"]))
    results = {name: getattr(scenarios, name)(engine) for name in given["scenarios"]}
    Path(output).write_text(json.dumps(results))
    end_engine(engine.core)
