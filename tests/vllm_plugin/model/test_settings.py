"""vLLM reads config.json of a TwoTower checkpoint as it is meant; what its model cannot compute is refused by name.

No engine is started: `EngineArgs.create_engine_config` does the work, in a process of its own.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.vllm_plugin.fork_server import results_of
from twotower_spec.demo.trio import trio_path

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")

READ = (
    "layer_norm_epsilon",
    "hybrid_override_pattern",
    "n_groups",
    "conv_kernel",
    "use_conv_bias",
    "n_routed_experts",
    "n_shared_experts",
    "max_position_embeddings",
)


def checkpoint(folder: Path, **changes: Any) -> str:
    """The bundled checkpoint without its weights, and with other values in its config.json; None takes a field out."""
    shutil.copytree(trio_path("twotower"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    left = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(left))
    return str(folder)


def more_positions(config: Any) -> Any:
    config.update({"max_position_embeddings": 1024})
    return config


def write_read(order: str, output: str) -> None:
    """Writes the fields that vLLM reads of each configuration, or why it is refused."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_twotower import compat

    def read(given: dict[str, Any]) -> dict[str, Any]:
        lacking = given.pop("lacking", None)
        if given.pop("by_function", False):
            given["hf_overrides"] = more_positions
        real = compat.missing_hooks
        more = lambda hooks: [*real(hooks), *(one for one in hooks if one.name == lacking)]  # noqa: E731
        try:
            with patch.object(compat, "missing_hooks", more):
                config = EngineArgs(**{"dtype": "float32", "max_model_len": 256, **given}).create_engine_config()
        except Exception as error:
            return {"error": str(error)}
        hf_config = config.model_config.hf_config
        return {name: getattr(hf_config, name) for name in READ} | {
            "class": f"{type(hf_config).__module__}.{type(hf_config).__name__}",
            "architecture": config.model_config.architecture,
            "ssm": config.cache_config.mamba_ssm_cache_dtype,
        }

    Path(output).write_text(json.dumps([read(given) for given in json.loads(order)]))


def read_by_vllm(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]]
    found, _ = results_of(f"{__name__}:write_read", json.dumps(given))
    return found


def test_fields_count_as_they_do_here_whatever_vllm_calls_them(tmp_path: Path) -> None:
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "as it is": ({}, {"layer_norm_epsilon": 1e-5, "n_groups": 2, "ssm": "float32"}),
        "norm_eps": ({"norm_eps": 1e-3}, {"layer_norm_epsilon": 1e-3}),
        "the other name": ({"norm_eps": None, "layer_norm_epsilon": 1e-3}, {"layer_norm_epsilon": 1e-3}),
        "other names of the class": (
            {"mamba_n_groups": 4, "mamba_d_conv": 3, "mamba_conv_bias": False},
            {"n_groups": 2, "conv_kernel": 4, "use_conv_bias": True},
        ),
        "an alias": ({"num_local_experts": 8}, {"n_routed_experts": 4}),
        "shared experts": ({"n_shared_experts": 2}, {"n_shared_experts": 1}),
        "no experts": (
            {"hybrid_override_pattern": "M*-M*-", "intermediate_size": 64, "n_routed_experts": None},
            {"n_routed_experts": 0, "hybrid_override_pattern": "M*-M*-"},
        ),
        "layers twice": (
            {"layers_block_type": ["mamba", "attention", "moe"] * 2},
            {"hybrid_override_pattern": "M*EM*E"},
        ),
        "dtype of states": ({"mamba_ssm_cache_dtype": "bfloat16"}, {"ssm": "bfloat16"}),
    }
    found = read_by_vllm([{"model": checkpoint(tmp_path / name, **given)} for name, (given, _) in cases.items()])
    for one, (name, (_, expected)) in zip(found, cases.items(), strict=True):
        assert one | expected == one, (name, one)
        assert one["architecture"] == "NemotronHTwoTowerForCausalLM"


def test_overrides_of_the_user_come_last(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", norm_eps=1e-3)
    by_name, by_function = read_by_vllm(
        [
            {"model": model, "hf_overrides": {"layer_norm_epsilon": 1e-4}},
            {"model": model, "by_function": True},
        ]
    )
    assert by_name["layer_norm_epsilon"] == 1e-4
    assert by_function["layer_norm_epsilon"] == 1e-3 and by_function["max_position_embeddings"] == 1024


def test_code_beside_the_weights_is_never_run(tmp_path: Path) -> None:
    classes = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}
    model = checkpoint(tmp_path / "model", auto_map=classes, norm_eps=1e-3)
    Path(model, "remote.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\nraise SystemExit('it ran')\n")
    for one in read_by_vllm([{"model": model}, {"model": model, "trust_remote_code": True}]):
        assert one["class"].startswith("transformers.") and one["layer_norm_epsilon"] == 1e-3
    assert not (tmp_path / "it ran").exists()


def test_what_cannot_be_computed_is_refused_in_a_sentence(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
        ({"norm_eps": 1e-3, "layer_norm_epsilon": 1e-5}, {}, ("norm_eps is 0.001", "layer_norm_epsilon is 1e-05")),
        ({"layers_block_type": ["mamba"] * 6}, {}, ("layers_block_type", "'M*EM*E'", "'MMMMMM'")),
        ({"sliding_window": 128}, {}, ("sliding_window 128",)),
        ({"moe_latent_size": 64}, {}, ("moe_latent_size 64",)),
        ({"residual_in_fp32": True}, {"dtype": "bfloat16"}, ("residual_in_fp32", "in bfloat16", "--dtype float32")),
        ({"head_dim": 20}, {}, ("head_dim 20", "takes 32, 64, 80", "use a GPU")),
        ({"attention_bias": True}, {}, ("attention_bias True",)),
        ({"tie_word_embeddings": True}, {}, ("tie_word_embeddings True",)),
        ({"time_step_limit": [0.001, 0.1]}, {}, ("time_step_limit [0.001, 0.1]",)),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, ("quantization_config", "fp8")),
        ({"experts_dtype": "int8"}, {}, ("experts in int8", "which vLLM's model does not read", "can draft")),
        ({"hidden_size": "wide"}, {}, ("hidden_size 'wide'",)),
        ({}, {"lacking": "ModelRegistry"}, ("lacks or has changed ModelRegistry", "as the speculative model")),
    ]
    folders = [checkpoint(tmp_path / f"{i}", **given) for i, (given, _, _) in enumerate(cases)]
    found = read_by_vllm([{"model": name, **more} for name, (_, more, _) in zip(folders, cases, strict=True)])
    for one, (given, _, parts) in zip(found, cases, strict=True):
        assert "error" in one, given
        assert all(part in one["error"] for part in parts), (given, one["error"])
        assert len(one["error"].strip().splitlines()) == 1, one["error"]


def test_a_dtype_that_holds_the_residual_stream_is_enough(tmp_path: Path) -> None:
    (found,) = read_by_vllm([{"model": checkpoint(tmp_path / "model", residual_in_fp32=True)}])
    assert "error" not in found
