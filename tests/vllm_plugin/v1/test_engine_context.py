"""The drafter reads the state of a verifier that is its own context tower: what it reads is what it would compute."""

import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.tolerances import FLOAT32_MODEL
from tests.vllm_plugin.own_state import T, run_itself
from twotower_spec import TwoTowerConfig, TwoTowerModel

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")

SHORT = [4, 5, 6, 4, 5, 6, 4, 5]
# Fewer tokens a step than running requests have drafts.
NARROW: dict[str, Any] = {"lengths": SHORT, "max_num_batched_tokens": 24}
# Blocks run out once requests have grown.
FULL: dict[str, Any] = {"lengths": SHORT, "max_tokens": 120, "max_model_len": 192, "num_gpu_blocks_override": 47}


@cache
def model_of(path: str) -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(path, dtype=torch.float32)


def own_texts(found: dict[str, Any], path: str = T) -> list[list[int]]:
    """Texts of `generate_ar` for the same prompts."""
    max_tokens = len(found["texts"][0])
    return model_of(path).generate_ar(found["prompts"], max_new_tokens=max_tokens, eos_token_id=None).token_ids


def check(found: dict[str, Any], *experiences: str, path: str = T) -> None:
    """Checks what every run must show: contexts as computed, the tower's own text, and no pass of a second one."""
    assert found["texts"] == own_texts(found, path)
    assert found["session"] == "HostedSession" and found["context_tokens"] == found["errors"] == 0
    assert found["difference"] < FLOAT32_MODEL, found["compared"]
    assert set(experiences) <= found["compared"].keys(), found["compared"]


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_layers")
def test_contexts_after_prompts_and_after_drafts_that_were_partly_accepted() -> None:
    found = run_itself(passes=2, change={"policy": "threshold", "block_size": 8, "steps_per_block": 3})
    check(found, "prompt", "none of the drafts", "some of the drafts", "all of the drafts")
    assert found["accepted"] > 50 and found["memory"].startswith("no context tower and no state of its own")
    assert found["log"].count("drafts from the verifier's own state") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_layers")
def test_contexts_after_prefix_hits_and_prompts_in_pieces() -> None:
    found = run_itself(enable_prefix_caching=True, passes=2, shared=200, max_tokens=32, max_num_batched_tokens=128)
    check(found, "prefix hit", "prompt in pieces", "some of the drafts")
    assert found["compared"]["prefix hit"] > 50


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_layers")
def test_contexts_of_requests_that_a_step_left_out() -> None:
    check(run_itself(**NARROW), "left out", "some of the drafts")


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_layers")
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_contexts_of_requests_that_were_preempted(prefix_caching: bool) -> None:
    found = run_itself(enable_prefix_caching=prefix_caching, max_num_batched_tokens=40, **FULL)
    check(found, "preempted", "some of the drafts")
    assert found["preemptions"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_layers")
def test_contexts_of_layers_in_several_cache_groups_and_a_policy_that_adapts(tmp_path: Path) -> None:
    config = TwoTowerConfig.from_pretrained(T).replace(hybrid_override_pattern="M**E*", num_hidden_layers=5)
    TwoTowerModel.from_config(config, seed=3).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(T, name), tmp_path)
    found = run_itself(model=str(tmp_path), knobs={"policy": "adaptive", "steps_per_block": None}, max_tokens=32)
    check(found, "none of the drafts", path=str(tmp_path))
    assert found["attention_groups"] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_layers")
def test_a_view_that_fails_costs_drafts_of_that_round_alone() -> None:
    found = run_itself(fault="failing views")
    assert found["texts"] == own_texts(found)
    assert found["errors"] > 5 and found["accepted"] > 20
    assert found["log"].count("(ZeroDivisionError: injected); please report this") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_layers")
def test_a_state_that_turns_out_to_be_unreadable_leaves_requests_without_drafts() -> None:
    found = run_itself(fault="unreadable cache")
    assert found["texts"] == own_texts(found)
    assert found["drafted"] == 0 and found["not_loaded"] > 5 and found["session"] == "NoneType"
    assert found["log"].count("the verifier's state cannot be read; vLLM goes on without drafts") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_layers")
def test_a_backend_that_cannot_be_read_gives_the_drafter_a_context_tower_of_its_own() -> None:
    found = run_itself(fault="unreadable backend")
    assert found["texts"] == own_texts(found)
    assert found["session"] == "DraftingSession" and found["accepted"] > 50 and found["context_tokens"] > 0
    reason = "the verifier's cache cannot be read, CPU_ATTN lays out keys in a way that no strides describe"
    assert found["log"].count(f"has a context tower of its own beside the verifier's: {reason}") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"found": {"drafts_for_itself": False}}, "another model"),
        ({"parallel": {"tensor_parallel_size": 2}}, "tensor_parallel_size 2 divides"),
        ({"knobs": {"context_device": "cpu"}}, "context_device says where it is, on cpu"),
        ({"knobs": {"dtype": "bfloat16"}}, "the knob dtype is bfloat16, and the verifier's torch.float32"),
        ({"knobs": {"dtype": "float32", "denoiser_device": "cpu"}}, None),
        ({"dtype": torch.float16}, "do not compute in the verifier's torch.float16"),
        ({"cache": {"cache_dtype": "fp8"}}, "kept as fp8"),
        ({"cache": {"mamba_cache_mode": "all"}}, "mamba_cache_mode is all"),
        ({"cache": {"use_replayssm": True}}, "ReplaySSM"),
        ({"found": {"block_size": 1}}, "blocks of 1"),
    ],
)
def test_what_needs_two_context_towers_is_named(changes: dict[str, Any], reason: str | None) -> None:
    from vllm_twotower.config import DrafterKnobs, FoundAtStart
    from vllm_twotower.v1.one_tower import obstacle

    found = {"block_size": 16, "num_token_ids": 2048, "drafts_for_itself": True, **changes.get("found", {})}
    cache = {"cache_dtype": "auto", "mamba_cache_mode": "align", "use_replayssm": False, **changes.get("cache", {})}
    vllm_config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(**cache),
        parallel_config=SimpleNamespace(**{"tensor_parallel_size": 1, **changes.get("parallel", {})}),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    dtype = changes.get("dtype", torch.float32)
    knobs = DrafterKnobs(model=T, **changes.get("knobs", {}))
    said = obstacle(knobs, FoundAtStart(**found), vllm_config, torch.device("cpu"), dtype)
    assert said is None if reason is None else said is not None and reason in said


def test_defaults_and_policies_leave_room_for_the_token_that_begins_a_block() -> None:
    from vllm_twotower.config import DrafterKnobs

    adaptive, fixed = DrafterKnobs(model=T), DrafterKnobs(model=T, policy="fixed")
    sizes = {k: adaptive.policy_for(k, 16, num_known=1).block_sizes for k in (3, 7, 8, 15, 16)}  # type: ignore[union-attr]
    assert sizes == {3: (4,), 7: (4, 8), 8: (4, 8, 16), 15: (4, 8, 16), 16: (4, 8, 16)}
    policy = fixed.policy_for(16, 16, num_known=1)
    assert policy is not None and policy.num_speculative_tokens == 15
