"""Every spelling of the speculative settings leads to the proposer, and what cannot work is refused in a sentence.

vLLM's own `EngineArgs.create_engine_config` does the work, as in every way to start it; no engine is started. In
processes of their own, since vLLM changes the one that it works in.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.nemotron_h import save_nemotron_h
from tests.vllm_plugin.fork_server import results_of
from twotower_spec import ArgumentError
from twotower_spec.demo.trio import trio_path
from vllm_twotower.config import DrafterKnobs
from vllm_twotower.requirements import _check_experts

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")

PROPOSER = "vllm_twotower.TwoTowerProposer"


def config_of(given: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if "cli" in given:
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        return AsyncEngineArgs.from_cli_args(parser.parse_args(given["cli"])).create_engine_config()
    return EngineArgs(**given).create_engine_config()


def outcome(given: dict[str, Any]) -> dict[str, Any]:
    try:
        config = config_of(given)
    except Exception as error:
        return {"error": str(error), "kind": type(error).__name__}
    speculative = config.speculative_config
    if speculative is None:
        return {"method": None}
    return {
        "method": speculative.method,
        "model": speculative.model,
        "num_speculative_tokens": speculative.num_speculative_tokens,
        "knobs": config.additional_config.get("twotower"),
        "found": config.additional_config.get("twotower_found"),
        "on_v2": getattr(config, "use_v2_model_runner", False),
        "primitives": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"),
    }


def write_outcomes(given: str, output: str) -> None:
    Path(output).write_text(json.dumps([outcome(one) for one in json.loads(given)]))


def outcomes(given: list[dict[str, Any]], log_to: Path | None = None, **environment: str) -> list[dict[str, Any]]:
    """Outcome of each set of arguments in vLLM, after the verifier was added; with a copy of the log."""
    verifier = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    filled = [
        {"cli": ["--model", str(trio_path("verifier")), "--dtype", "float32", "--enforce-eager", *one["cli"]]}
        if "cli" in one
        else {"model": str(trio_path("verifier")), **verifier, **one}
        for one in given
    ]
    found: list[dict[str, Any]]
    found, said = results_of(f"{__name__}:write_outcomes", json.dumps(filled), environment)
    if log_to is not None:
        log_to.write_text(said)
    return found


def test_every_spelling_leads_to_the_proposer() -> None:
    drafter = str(trio_path("twotower"))
    knobs = {"policy": "fixed", "block_size": 8}
    spellings: list[dict[str, Any]] = [
        {"cli": ["--speculative-model", drafter, "--spec-tokens", "15"]},
        {"cli": ["--spec-model", drafter, "--spec-tokens", "15"]},
        {"cli": ["--speculative-config", json.dumps({"model": drafter, "num_speculative_tokens": 15})]},
        {"cli": ["--speculative-config", json.dumps({"model": drafter, "num-speculative-tokens": 15})]},
        {"speculative_config": {"model": drafter, "method": "twotower", "num_speculative_tokens": 15}},
        {"spec_model": drafter, "spec_method": "twotower", "spec_tokens": 15},
        {
            "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 15},
            "additional_config": {"twotower": {"model": drafter}},
        },
        {"speculative_config": {"model": drafter, "method": "TwoTower", "num_speculative_tokens": 15}},
        {"speculative_config": {"model": drafter, "method": "TWO-TOWER", "num_speculative_tokens": 15}},
        {"speculative_config": {"model": drafter, "method": "draft_model", "num_speculative_tokens": 15}},
        {"speculative_config": {"model": drafter, "method": "custom_class", "num_speculative_tokens": 15}},
        {"speculative_config": {"model": drafter, "num_speculative_tokens": None}},
        {"speculative_config": {"model": drafter, "twotower": knobs}},
    ]
    found = outcomes(spellings)
    for one in found:
        assert one.get("method") == "custom_class" and one["model"] == PROPOSER, one
        assert one["knobs"]["model"] == drafter and one["found"]["num_token_ids"] == 2048
    assert [one["num_speculative_tokens"] for one in found] == [15] * 11 + [16, 8]
    assert found[-1]["knobs"] | knobs == found[-1]["knobs"]
    assert [one["found"]["block_size"] for one in found[-2:]] == [16, 8]


@pytest.mark.usefixtures("mamba_layers")
def test_a_checkpoint_that_verifies_drafts_for_itself_where_it_is_asked_to(tmp_path: Path) -> None:
    drafter = str(trio_path("twotower"))
    copy = broken_copy(tmp_path / "copy")
    linked = tmp_path / "linked"
    linked.symlink_to(drafter)
    spellings: list[tuple[bool, dict[str, Any]]] = [
        (True, {"cli": ["--model", drafter, "--speculative-model", drafter, "--spec-tokens", "7"]}),
        (True, {"cli": ["--model", drafter, "--spec-method", "twotower", "--spec-tokens", "7"]}),
        (True, {"speculative_config": {"num_speculative_tokens": 7, "twotower": {"self": True}}}),
        (True, {"additional_config": {"twotower": {"self": True}}, "spec_tokens": 7}),
        (True, {"speculative_config": {"model": str(linked), "num_speculative_tokens": 7, "twotower": {"self": True}}}),
        (
            True,
            {
                "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 7},
                "additional_config": {"twotower": {"self": True}},
            },
        ),
        (False, {"speculative_config": {"model": drafter, "num_speculative_tokens": 7, "twotower": {"self": False}}}),
        (False, {"speculative_config": {"model": copy, "num_speculative_tokens": 7}}),
    ]
    found = outcomes([given if "cli" in given else {"model": drafter, **given} for _, given in spellings])
    for one, (for_itself, given) in zip(found, spellings, strict=True):
        assert one.get("model") == PROPOSER and one["num_speculative_tokens"] == 7, (given, one)
        assert one["found"]["drafts_for_itself"] == for_itself, given
        assert "self" not in one["knobs"]


def test_drafting_for_itself_is_refused_where_nothing_can(tmp_path: Path) -> None:
    drafter, verifier = str(trio_path("twotower")), str(trio_path("verifier"))
    copy = broken_copy(tmp_path / "copy")
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"model": verifier, "twotower": {"self": True}}, (verifier, "is no TwoTower checkpoint", "serve one")),
        ({"model": drafter, "twotower": {"self": "yes"}}, ("self 'yes'", "give true")),
        ({"model": drafter, "twotower": {"self": False}}, ("no TwoTower checkpoint is named",)),
        ({"model": drafter, "spec_model": copy, "twotower": {"self": True}}, (copy, drafter, "give one of the two")),
        ({"model": verifier, "method": "twotower"}, ("no TwoTower checkpoint is named",)),
    ]
    found = outcomes(
        [
            {
                "model": given["model"],
                "spec_model": given.get("spec_model"),
                "speculative_config": {key: given[key] for key in ("method", "twotower") if key in given},
            }
            for given, _ in cases
        ]
    )
    for one, (given, parts) in zip(found, cases, strict=True):
        assert "error" in one, given
        assert all(part in one["error"] for part in parts), (given, one["error"])
        assert len(one["error"].strip().splitlines()) == 1, one["error"]


def test_other_speculative_methods_are_left_alone() -> None:
    draft = str(trio_path("draft"))
    found = outcomes(
        [
            {},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}},
            {"speculative_config": {"model": draft, "num_speculative_tokens": 4}},
            {"speculative_config": {"model": "no/such-model", "num_speculative_tokens": 4}},
            {
                "speculative_config": {
                    "method": "ngram",
                    "model": str(trio_path("twotower")),
                    "num_speculative_tokens": 4,
                    "prompt_lookup_max": 3,
                }
            },
            {"speculative_config": {"model": "a.b" * 200, "num_speculative_tokens": 4}},
        ]
    )
    assert [one.get("method") for one in found[:3]] == [None, "ngram", "draft_model"]
    assert found[2]["model"] == draft and found[2]["knobs"] is None
    assert "no/such-model" in found[3]["error"] and "twotower" not in found[3]["error"].lower()
    assert found[4]["method"] == "ngram" and "a.ba.b" in found[5]["model"]


def test_vllm_plugins_switches_it_off_and_the_spelling_without_plugin_still_works() -> None:
    drafter = str(trio_path("twotower"))
    off, without_plugin = outcomes(
        [
            {"speculative_config": {"model": drafter, "num_speculative_tokens": 4}},
            {
                "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 4},
                "additional_config": {"twotower": {"model": drafter}},
            },
        ],
        VLLM_PLUGINS="another",
    )
    assert "error" in off
    assert without_plugin["method"] == "custom_class" and without_plugin["knobs"] == {"model": drafter}


def broken_copy(folder: Path, **changes: Any) -> str:
    """A copy of the bundled TwoTower model with other values in its config.json."""
    shutil.copytree(trio_path("twotower"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def test_what_cannot_work_is_refused_by_name(tmp_path: Path) -> None:
    drafter = str(trio_path("twotower"))
    truncated = broken_copy(tmp_path / "truncated")
    weights = Path(truncated) / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    headless = broken_copy(tmp_path / "headless")
    (Path(headless) / "model.safetensors").unlink()
    wider = broken_copy(tmp_path / "wider", hidden_size=512)
    eight = broken_copy(tmp_path / "eight", block_size="8")
    stranger = broken_copy(tmp_path / "stranger")
    tokenizer = json.loads((Path(stranger) / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = [token for token, token_id in vocab.items() if token_id in (300, 301)]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (Path(stranger) / "tokenizer.json").write_text(json.dumps(tokenizer))

    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"model": drafter, "twotower": {"block_sice": 8}}, ("block_sice", "did you mean block_size")),
        ({"model": drafter, "twotower": {"num_token_ids": 8}}, ("'num_token_ids' is not there", "allowed are model")),
        ({"model": drafter, "twotower": {"policy": "best"}}, ("policy 'best'", "adaptive")),
        ({"model": drafter, "twotower": {"confidence_threshold": 7}}, ("confidence_threshold 7",)),
        ({"model": drafter, "twotower": {"first_token": "last"}}, ("first_token 'last'", "denoiser")),
        ({"model": drafter, "twotower": {"verification": "p/q"}}, ("verification 'p/q'", "coupled")),
        ({"model": drafter, "twotower": {"dtype": "int4"}}, ("dtype 'int4'", "bfloat16")),
        ({"model": drafter, "twotower": {"pool_requests": 0}}, ("pool_requests 0",)),
        ({"model": drafter, "twotower": 5}, ("twotower 5",)),
        ({"model": drafter, "num_speculative_tokens": 0}, ("num_speculative_tokens 0", "from 1 to 128")),
        ({"model": drafter, "num_speculative_tokens": -3}, ("num_speculative_tokens -3",)),
        ({"model": drafter, "num_speculative_tokens": "7"}, ("num_speculative_tokens '7'",)),
        ({"model": drafter, "num_speculative_tokens": [7]}, ("num_speculative_tokens [7]",)),
        ({"model": drafter, "num_speculative_tokens": True}, ("num_speculative_tokens True",)),
        ({"model": drafter, "num_speculative_tokens": 7.0}, ("num_speculative_tokens 7.0",)),
        ({"model": drafter, "num_speculative_tokens": 10**9}, ("num_speculative_tokens 1000000000", "to 128")),
        (
            {"model": drafter, "num_speculative_tokens": 129, "twotower": {"block_size": 256}},
            ("num_speculative_tokens 129", "to 128"),
        ),
        ({"model": drafter, "twotower": {"block_size": 10**9}}, ("block_size 1000000000", "to 1024")),
        ({"model": eight}, ("eight", "block_size '8'")),
        ({"model": drafter, "twotower": {"context_device": "cuda:7"}}, ("context_device", "cuda:7 is not there")),
        (
            {"model": drafter, "twotower": {"experts_per_token": 3}},
            ("twotower knob experts_per_token 3", "from 1 to 2"),
        ),
        ({"model": drafter, "twotower": {"experts_dtype": "fp4"}}, ("experts_dtype 'fp4'", "float8_e4m3fn, int8")),
        ({"model": drafter, "twotower": {"denoiser_device": "meta"}}, ("denoiser_device", "meta")),
        ({"model": drafter, "twotower": {"denoiser_device": "xpu"}}, ("denoiser_device", "xpu is not supported")),
        ({"model": drafter, "twotower": {"context_device": "the gpu"}}, ("context_device", "'the gpu'")),
        ({"model": drafter, "twotower": {"model": "another"}}, (repr(drafter), "'another'", "give one")),
        ({"model": drafter, "method": "eagle"}, ("method 'eagle'", "is a TwoTower checkpoint", "'twotower'")),
        ({"model": drafter, "method": "two towers"}, ("method 'two towers'", "'twotower'")),
        ({"model": 5, "method": "twotower"}, ("model 5",)),
        ({"model": drafter, "num_speculative_tokens": 17}, ("num_speculative_tokens 17", "block_size 16")),
        ({"model": drafter, "num_speculative_tokens": 9, "twotower": {"block_size": 8}}, ("9", "block_size 8")),
        ({"method": "twotower", "model": str(tmp_path / "nowhere")}, ("nowhere", "config.json")),
        ({"model": str(tmp_path / "nowhere"), "twotower": {}}, ("nowhere", "config.json cannot be read")),
        ({"method": "twotower"}, ("no TwoTower checkpoint is named",)),
        ({"model": truncated}, ("truncated", "corrupt")),
        ({"model": headless}, ("headless", "safetensors")),
        ({"model": wider}, ("wider", "misshaped")),
        ({"model": stranger}, ("token id 300", "tokenizer")),
    ]
    found = outcomes([{"speculative_config": given} for given, _ in cases])
    for one, (given, parts) in zip(found, cases, strict=True):
        assert "error" in one, given
        assert all(part in one["error"] for part in parts), (given, one["error"])
        assert len(one["error"].strip().splitlines()) == 1, one["error"]


def test_a_tokenizer_that_cannot_be_read_is_named_in_the_log_with_a_remedy(tmp_path: Path) -> None:
    damaged = broken_copy(tmp_path / "damaged")
    (Path(damaged) / "tokenizer.json").write_text('{"model": ')
    (found,) = outcomes([{"speculative_config": {"model": damaged}}], log_to=tmp_path / "log")
    assert found["knobs"]["model"] == damaged
    (line,) = [one for one in (tmp_path / "log").read_text().splitlines() if "is not checked" in one]
    assert f"the tokenizer in {damaged} cannot be read" in line and "put the verifier's tokenizer files into" in line


def test_settings_of_other_drafters_are_named_in_the_log_and_dropped(tmp_path: Path) -> None:
    given = {
        "model": str(trio_path("twotower")),
        "num_speculative_tokens": 4,
        "max_model_len": 128,
        "enforce_eager": True,
        "quantization": None,
        "parallel_drafting": False,
        "use_heterogeneous_vocab": True,
        "draft_tensor_parallel_size": 1,
        "rejection_sample_method": "block",
    }
    found = outcomes([{"speculative_config": given}], log_to=tmp_path / "log")
    assert found[0].get("num_speculative_tokens") == 4, found
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if "mean nothing to this drafter" in line]
    assert found[0]["primitives"] == "128"
    names = "max_model_len, enforce_eager, use_heterogeneous_vocab, draft_tensor_parallel_size, rejection_sample_method"
    assert len(lines) == 1 and f"TwoTower: {names} of the speculative settings" in lines[0]


def test_verifiers_that_cannot_be_served_are_refused() -> None:
    given = {"speculative_config": {"model": str(trio_path("twotower")), "num_speculative_tokens": 4}}
    (piped,) = outcomes([{**given, "pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}])
    assert "pipeline_parallel_size 2" in piped["error"]
    (routed,) = outcomes([given], ONEDNN_PRIMITIVE_CACHE_CAPACITY="300")
    assert routed["primitives"] == "300"  # what the user has chosen stays
    (scheduled,) = outcomes([{**given, "async_scheduling": True}], VLLM_USE_V2_MODEL_RUNNER="0")
    assert "--async-scheduling needs vLLM's model runner V2" in scheduled["error"]
    (forced,) = outcomes([given], VLLM_USE_V2_MODEL_RUNNER="1")
    assert "model runner V2 needs Triton" in forced["error"]  # tests/vllm_plugin/v2 has it
    refused, afterwards = outcomes([{**given, "async_scheduling": True}, given])
    assert "model runner V2 needs Triton" in refused["error"] and afterwards["method"] == "custom_class"


def test_a_hybrid_is_refused_on_a_cpu_by_its_kind_of_layer_or_by_ids_that_differ(
    tmp_path: Path, missing_for_mamba_layers: list[str]
) -> None:
    verifier = hybrid_verifier(tmp_path / "hybrid")
    given = {"speculative_config": {"model": str(trio_path("twotower")), "num_speculative_tokens": 4}}
    stranger = save_nemotron_h(tmp_path / "stranger", vocabulary=2048)
    tokenizer = json.loads((trio_path("verifier") / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = (next(token for token, token_id in vocab.items() if token_id == wanted) for wanted in (300, 301))
    vocab[first], vocab[second] = 301, 300
    (stranger / "tokenizer.json").write_text(json.dumps(tokenizer))
    found, other = outcomes([{**given, "model": verifier}, {**given, "model": str(stranger)}])
    assert "is a JambaForCausalLM with layers of the kind mamba, whose recurrent states" in found["error"]
    if missing_for_mamba_layers:
        assert f"lacks or has changed {', '.join(missing_for_mamba_layers)}, without which" in other["error"]
    else:
        assert "300" in other["error"] and repr(first) in other["error"] and repr(second) in other["error"]


def hybrid_verifier(folder: Path) -> str:
    """A tiny Jamba configuration with the trio's tokenizer; no weights are needed to be refused."""
    from transformers import JambaConfig

    JambaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        architectures=["JambaForCausalLM"],
    ).save_pretrained(folder)
    for file in trio_path("verifier").glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


@pytest.mark.parametrize(
    ("capability", "devices", "is_refused"),
    [((8, 0), {}, True), ((8, 9), {}, False), ((8, 0), {"context_device": "cpu"}, False)],
)
def test_float8_experts_are_refused_at_start_on_gpus_that_do_not_convert_them(
    capability: tuple[int, int], devices: dict[str, str], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import platforms
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class Gpu(Platform):
        _enum = PlatformEnum.CUDA

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "a GPU"

    monkeypatch.setattr(platforms, "current_platform", Gpu())
    knobs = DrafterKnobs("T", experts_dtype="float8_e4m3fn", **devices)  # type: ignore[arg-type]
    if is_refused:
        with pytest.raises(ArgumentError, match=r"compute capability 8\.9, which a GPU has not; give 'int8'"):
            _check_experts(knobs, knobs.experts_dtype)
    else:
        _check_experts(knobs, knobs.experts_dtype)
