"""Memory that `inspect --verifier` adds up, against what vLLM itself computes for a verifier with Mamba layers."""

from __future__ import annotations

import inspect
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.nemotron_h import save_nemotron_h
from tests.vllm_plugin.fork_server import results_of
from twotower_spec.cache_shape import CacheShape
from twotower_spec.config import ATTENTION, MAMBA
from twotower_spec.demo.trio import trio_path
from twotower_spec.serving_memory import serving_memory

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")

NUM_DRAFTS, NUM_SEQS = 3, 5
# Heads, groups and ranks that share them.
SHARED = ((8, 2, 1), (8, 2, 2), (8, 2, 4), (64, 8, 8), (64, 8, 16))


@pytest.mark.slow
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_states_and_keys_are_as_large_as_vllm_says(tmp_path: Path, prefix_caching: bool) -> None:
    verifier = save_nemotron_h(tmp_path / "verifier", vocabulary=2048)
    order = json.dumps({"model": str(verifier), "prefix_caching": prefix_caching})
    specs, _ = results_of(f"{__name__}:write_specs", order)
    sizes = {"num_speculative_tokens": NUM_DRAFTS, "max_num_seqs": NUM_SEQS, "context_length": 64}
    memory = serving_memory(trio_path("twotower"), verifier, dtype="float32", **sizes)
    lines = {line.name: line for line in memory.lines if line.holder == "verifier"}
    assert specs["state_bytes"] == memory.state_bytes > 0
    mode, num_states = ("align", 3 + NUM_DRAFTS) if prefix_caching else ("none", 1 + NUM_DRAFTS)
    assert (specs["mode"], specs["states_per_request"]) == (mode, num_states)
    assert lines[f"Mamba states, {mode}"].total == NUM_SEQS * num_states * specs["state_bytes"]
    assert lines["keys and values"].num_bytes == specs["bytes_per_token"] > 0
    shapes = [shape_on_rank(*shared) for shared in SHARED]
    assert specs["shared"] == [shape.state(NUM_DRAFTS)[0] for shape in shapes]


def shape_on_rank(num_heads: int, num_groups: int, num_ranks: int) -> CacheShape:
    """Sizes of one Mamba layer on one rank."""
    dtypes = {"dtype": torch.bfloat16, "ssm_dtype": torch.float32}
    whole = CacheShape(MAMBA + ATTENTION, 2, 64, num_heads, 16, num_groups, 32, 4, **dtypes)
    return whole.on_rank(num_ranks)


def write_specs(order: str, output: str) -> None:
    """Sizes by the cache specifications of an engine in this process, and of shapes that ranks share."""
    from vllm import LLM
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
    from vllm.v1.kv_cache_interface import MambaSpec

    given = json.loads(order)
    llm: Any = LLM(
        model=given["model"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=NUM_SEQS,
        enable_prefix_caching=given["prefix_caching"],
        speculative_config={"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "prompt_lookup_max": 2},
    )
    config = llm.llm_engine.vllm_config
    (specs,) = llm.collective_rpc("get_kv_cache_spec")
    # vLLM's own: on a CPU the plugin leaves out the state at the end of a prompt.
    layers = config.compilation_config.static_forward_context
    stock = inspect.unwrap(MambaMixer2.get_kv_cache_spec)
    states = [stock(layer, config) for layer in layers.values() if isinstance(layer, MambaMixer2)]
    keys = [spec for spec in specs.values() if not isinstance(spec, MambaSpec)]
    sizes = [spec.max_memory_usage_bytes(config) // spec.page_size_bytes for spec in states]
    shared = []
    for num_heads, num_groups, num_ranks in SHARED:
        conv, ssm = MambaStateShapeCalculator.mamba2_state_shape(
            num_ranks, num_heads * 16, num_groups, num_heads, 16, 32, 4, NUM_DRAFTS
        )
        shared.append(2 * torch.Size(conv).numel() + 4 * torch.Size(ssm).numel())
    results = {
        "state_bytes": sum(spec.state_content_size_bytes for spec in states),
        "states_per_request": max(sizes),
        "mode": config.cache_config.mamba_cache_mode,
        "bytes_per_token": sum(spec.page_size_bytes // spec.block_size for spec in keys),
        "shared": shared,
    }
    Path(output).write_text(json.dumps(results))
    llm.llm_engine.engine_core.shutdown()
