"""Engines of vLLM with model runner V2, interpreted: a step costs about 0.1 s of a core, a start half a minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.vllm_plugin.engine import run_engine
from tests.vllm_plugin.fork_server import V2_ON_CPU


def run_v2_engine(
    scenarios: Sequence[str],
    speculative_config: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    **engine_args: Any,
) -> dict[str, Any]:
    """Results of scenarios by name, as from `run_engine`."""
    return run_engine(scenarios, speculative_config, {**V2_ON_CPU, **(environment or {})}, **engine_args)
