"""Contexts in vLLM's cache on emulated devices: drafts from them are those from a context of our own on a CPU."""

from __future__ import annotations

import logging
import os
import re
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cuda.paths import PROMPTS, placed
from tests.drafting.rounds import draft_rows
from tests.support.cuda import Usage, emulated_devices
from tests.vllm_plugin.fork_server import TESTED_VERSION
from twotower_spec import TwoTowerModel
from twotower_spec.drafting import DraftPolicy, FixedPolicy, HostedSession, ThresholdPolicy
from twotower_spec.state import ContextState

if not find_spec("vllm") or TESTED_VERSION in os.environ:  # others make batches otherwise
    pytest.skip("needs the environment's vLLM", allow_module_level=True)

from vllm import SamplingParams
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MambaSpec
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from tests.vllm_plugin.v1.test_page_layout import gpu_layer
from vllm_twotower.v1.engine_context import EngineContext

# Two attention layers, each in a group of its own.
PATTERN = "M**E"
TEXTS = {name: [*prompt, 4] for name, prompt in zip("abc", PROMPTS, strict=True)}
# Of every request: tokens that the last step committed, the block in which that step found its state, and its blocks of
# keys; vLLM writes the state after each of a step's tokens into a block of its own.
NUM_ACCEPTED = (1, 3, 2)
FIRST_STATES = (4, 1, 7)
BLOCKS = ([5], [2], [7])
NUM_BLOCKS, PAGE_SIZE, BLOCK_SIZE, MOST_DRAFTS = 11, 16, 32, 4


def contexts(model: TwoTowerModel) -> ContextState:
    """State that the context tower computes of all tokens but the newest."""
    state = ContextState.for_towers(model, 3, 12)
    for name, text in TEXTS.items():
        state.claim(name)
        state.extend(model.context, {name: text[:-1]}, logits="none")
    return state


def engine(model: TwoTowerModel, device: str) -> Any:
    """The parts of vLLM's runner that are read, whose cache on a device holds the contexts and nothing else."""
    config, state = model.config, contexts(model)
    taps = config.conv_kernel - 1
    mamba = MambaSpec(
        block_size=BLOCK_SIZE,
        shapes=((taps + MOST_DRAFTS, config.d_conv_channels), state.mamba.ssm.shape[2:]),
        dtypes=(torch.float32, torch.float32),
    )
    attention = FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        dtype=torch.float32,
    )
    groups = [
        KVCacheGroupSpec([f"layers.{i}.mixer"], mamba if kind == "M" else attention) for i, kind in enumerate("M**")
    ]
    conv, ssm = (torch.full((NUM_BLOCKS, *shape), torch.nan) for shape in mamba.shapes)
    pages = torch.full(
        (2, NUM_BLOCKS * BLOCK_SIZE // PAGE_SIZE, config.num_key_value_heads, PAGE_SIZE, 2 * config.head_dim), torch.nan
    )
    layers = [gpu_layer(None, config.num_key_value_heads, config.head_dim) for _ in range(2)]
    torch_device = torch.device(device)
    batch = InputBatch(3, 128, 64, torch_device, 61, [BLOCK_SIZE] * 3, [8] * 3, num_spec_tokens=MOST_DRAFTS)
    for row, (name, text) in enumerate(TEXTS.items()):
        slot, length, first = state.entry(name).slot, len(text) - 1, NUM_ACCEPTED[row] - 1
        conv[FIRST_STATES[row], first : first + taps] = state.mamba.conv[0, slot]
        ssm[FIRST_STATES[row] + first] = state.mamba.ssm[0, slot]
        keys, values = torch.empty(2, 2, length, config.num_key_value_heads, config.head_dim)
        state.kv_cache.pages.copy_tokens(state.entry(name).pages, keys, values)
        places = BLOCKS[row][0] * BLOCK_SIZE + torch.arange(length)
        for layer, cache, of_keys, of_values in zip(layers, pages, keys, values, strict=True):
            layer.impl.do_kv_cache_update(layer, of_keys, of_values, cache, places)
        states = [FIRST_STATES[row] + i for i in range(3)]
        params = SamplingParams(temperature=0.0)
        batch.add_request(
            CachedRequestState(name, text[:-1], [], params, None, (states, BLOCKS[row], BLOCKS[row]), length, text[-1:])
        )
    batch.num_accepted_tokens_cpu[:3] = NUM_ACCEPTED
    for layer, cache in zip(layers, pages, strict=True):
        layer.kv_cache = cache.to(torch_device)
    modules = [SimpleNamespace(kv_cache=(conv.to(torch_device), ssm.to(torch_device))), *layers]
    names = [group.layer_names[0] for group in groups]
    on_cpu = SimpleNamespace(synchronize=lambda: None)
    return SimpleNamespace(
        input_batch=batch,
        kv_cache_config=SimpleNamespace(kv_cache_groups=groups),
        compilation_config=SimpleNamespace(static_forward_context=dict(zip(names, modules, strict=True))),
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        num_accepted_tokens_event=on_cpu if device == "cpu" else torch.cuda.Event(),
    )


def hosted(policy: DraftPolicy, device: str, denoiser_device: str) -> HostedSession:
    """A session that reads an engine's contexts on one device, and drafts on one."""
    model = placed(device, denoiser_device, PATTERN)
    source = EngineContext(model.config, model.denoiser.device, model.denoiser.dtype)
    source.attach(engine(placed(pattern=PATTERN), device))
    return HostedSession(model, source, policy)


def rows_of(session: HostedSession) -> list[list[int]]:
    return draft_rows(session, TEXTS).rows()


POLICIES = [FixedPolicy(8, 2), ThresholdPolicy(4, 3, 0.05)]
PLACES = [("cpu", "cpu"), ("cuda:0", "cuda:0"), ("cuda:0", "cuda:1"), ("cuda:0", "cpu")]


@pytest.mark.slow
@pytest.mark.parametrize(("device", "denoiser_device"), PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_drafts_are_those_from_a_context_of_our_own(policy: DraftPolicy, device: str, denoiser_device: str) -> None:
    model = placed(pattern=PATTERN)
    expected = rows_of(HostedSession(model, contexts(model), policy))
    assert len({tuple(row) for row in expected}) == 3
    with emulated_devices():
        assert rows_of(hosted(policy, device, denoiser_device)) == expected


@pytest.mark.parametrize(("device", "lines"), [("cpu", 0), ("cuda:0", 1)])
def test_the_log_says_that_blocks_run_without_cuda_graphs(
    device: str, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    with emulated_devices(runs_kernels=False), caplog.at_level(logging.INFO, "twotower_spec"):
        hosted(FixedPolicy(8, 2), device, device).warm_up()
    assert caplog.text.count("run without CUDA graphs") == lines


def second_round(policy: DraftPolicy, usage: Usage, denoiser_device: str) -> Usage:
    """Counts what a round asks of devices once workspaces are there."""
    session = hosted(policy, "cuda:0", denoiser_device)
    for _ in range(2):
        usage.reset()
        draft_rows(session, TEXTS)
    return usage


@pytest.mark.parametrize("denoiser_device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_waits_for_the_engines_counts_and_the_drafts_alone(policy: DraftPolicy, denoiser_device: str) -> None:
    with emulated_devices(runs_kernels=False) as usage:
        waits = second_round(policy, usage, denoiser_device).waits
    assert {re.sub(r":\d+", "", place): count for place, count in waits.items()} == {
        "vllm_plugin/vllm_twotower/v1/engine_context.py synchronize an event": 1,
        "twotower_spec/state/transfer.py synchronize an event": 1,
    }


def test_states_and_keys_cross_to_the_denoisers_device_once_for_all_steps_of_a_block() -> None:
    with emulated_devices(runs_kernels=False) as usage:
        one = second_round(FixedPolicy(8, 1), usage, "cuda:1").crossings.total()
        assert one == second_round(FixedPolicy(8, 3), usage, "cuda:1").crossings.total() > 0
        assert not second_round(FixedPolicy(8, 3), usage, "cuda:0").crossings
