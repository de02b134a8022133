"""Every spelling of the speculative settings leads to our speculator where model runner V2 runs."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm_plugin.fork_server import TRITON_ON_CPU, V2_ON_CPU
from tests.vllm_plugin.test_routing import outcomes
from twotower_spec.demo.trio import trio_path
from vllm_twotower.runner import PROPOSER, drafts_on_v2

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")


def test_every_spelling_leads_to_the_speculator() -> None:
    drafter = str(trio_path("twotower"))
    custom_class = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 15}
    spellings: list[dict[str, Any]] = [
        {"cli": ["--speculative-model", drafter, "--spec-tokens", "15"]},
        {"cli": ["--spec-model", drafter, "--spec-tokens", "15", "--async-scheduling"]},
        {"cli": ["--speculative-config", json.dumps({"model": drafter, "num-speculative-tokens": 15})]},
        {"spec_model": drafter, "spec_method": "twotower", "spec_tokens": 15},
        {"speculative_config": custom_class, "additional_config": {"twotower": {"model": drafter}}},
        {"speculative_config": {"model": drafter, "method": "draft_model", "num_speculative_tokens": 15}},
        {"speculative_config": {"model": drafter, "num_speculative_tokens": 15}, "async_scheduling": False},
    ]
    found = outcomes(spellings, **V2_ON_CPU)
    for one in found:
        assert one.get("method") == "ngram_gpu" and one["model"] == PROPOSER and one["on_v2"], one
        assert one["knobs"]["model"] == drafter and one["found"]["num_token_ids"] == 2048
        assert one["num_speculative_tokens"] == 15


def test_v2_is_taken_where_vllm_takes_it_and_v1_is_said_to_be_for_a_reason(tmp_path: Path) -> None:
    drafter = str(trio_path("twotower"))
    given: dict[str, Any] = {"speculative_config": {"model": drafter, "num_speculative_tokens": 4}}
    itself = {**given, "model": drafter}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("V2", given),
        ("V2", {**given, "async_scheduling": True}),
        ("V2", {**given, "tensor_parallel_size": 2}),
        ("V1", itself),
        ("V2", {**itself, "async_scheduling": True}),
        ("V2", {**itself, "speculative_config": {**given["speculative_config"], "twotower": {"self": False}}}),
    ]
    halved = {**given, "ubatch_size": 2}  # which vLLM then refuses on a CPU
    *found, _ = outcomes([*(one for _, one in cases), halved], tmp_path / "log", **TRITON_ON_CPU)
    methods = {"V1": "custom_class", "V2": "ngram_gpu"}
    for one, (runner, asked) in zip(found, cases, strict=True):
        assert one.get("method") == methods[runner] and one["on_v2"] == (runner == "V2"), (asked, one)
    reasons = [line for line in (tmp_path / "log").read_text().splitlines() if "on vLLM's model runner V1: " in line]
    assert len(reasons) == 2
    assert "no second context tower" in reasons[0] and "two halves of a batch" in reasons[1]
    (off,) = outcomes([given], **TRITON_ON_CPU, VLLM_USE_V2_MODEL_RUNNER="0")
    assert off["method"] == "custom_class" and not off["on_v2"]


def test_arguments_that_were_routed_are_routed_likewise_again() -> None:
    drafter = str(trio_path("twotower"))
    two_towers = {"model": drafter, "num_speculative_tokens": 4, "twotower": {"self": False}}
    for given in ({"speculative_config": two_towers}, {"speculative_config": {**two_towers, "twotower": {}}}):
        (first,) = outcomes([{**given, "model": drafter}], **TRITON_ON_CPU)
        names = ("method", "model", "num_speculative_tokens")
        again = {
            "model": drafter,
            "speculative_config": {name: first[name] for name in names},
            "additional_config": {"twotower": first["knobs"], "twotower_found": first["found"]},
        }
        assert outcomes([again], **TRITON_ON_CPU) == [first]


def test_what_ranks_cannot_share_yet_is_refused() -> None:
    given = {"speculative_config": {"model": str(trio_path("twotower")), "num_speculative_tokens": 4}}
    sharded, split = outcomes(
        [
            {**given, "tensor_parallel_size": 2, "enable_batch_sharded_sampling": True},
            {**given, "prefill_context_parallel_size": 2},
        ],
        **V2_ON_CPU,
    )
    assert "enable_batch_sharded_sampling" in sharded["error"] and "leave it out" in sharded["error"]
    assert "prefill_context_parallel_size 2" in split["error"] and "give 1" in split["error"]


def test_the_n_gram_drafter_of_vllm_is_told_from_ours() -> None:
    from vllm.config.speculative import SpeculativeConfig

    import vllm_twotower

    vllm_twotower.register()
    ours = SimpleNamespace(method="ngram_gpu", model=PROPOSER)
    theirs = SimpleNamespace(method="ngram_gpu", model="ngram_gpu")
    assert drafts_on_v2(ours) and not drafts_on_v2(theirs)
    # Model runner V1 asks for this before it makes an n-gram drafter.
    assert not SpeculativeConfig.use_ngram_gpu(ours) and SpeculativeConfig.use_ngram_gpu(theirs)
