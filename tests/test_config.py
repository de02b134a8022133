"""Reading config.json, and what is refused in it, by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden_files import checkpoint
from twotower_spec import ArgumentError, ConfigError, DiffusionConfig, TwoTowerConfig


def raw(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint("T2") / "config.json").read_text())
    return {**content, **changes}


def test_published_fields_are_read() -> None:
    config = TwoTowerConfig.from_pretrained(checkpoint("T2"))
    assert (config.hidden_size, config.hybrid_override_pattern, config.n_routed_experts) == (96, "MEM*EME*M", 16)
    assert config.mask_token_id == 3
    assert config.d_conv_channels == 6 * 24 + 2 * 3 * 20


def test_bare_infinity_is_accepted_and_written_back() -> None:
    assert "Infinity" in (checkpoint("T2") / "config.json").read_text()
    config = TwoTowerConfig.from_pretrained(checkpoint("T2"))
    assert "Infinity" in config.to_json()
    assert TwoTowerConfig.from_dict(json.loads(config.to_json())) == config


def test_unknown_fields_are_kept() -> None:
    config = TwoTowerConfig.from_dict(raw(house_style="baroque", dtype="bfloat16"))
    assert config.to_dict()["house_style"] == "baroque"
    assert config.to_dict()["rope_theta"] == 10000


def test_written_fields_are_those_that_were_read() -> None:
    content = raw()
    assert TwoTowerConfig.from_dict(content).to_dict() == content


def test_mask_token_id_is_written_when_it_is_not_the_default() -> None:
    config = TwoTowerConfig.from_dict(raw(mask_token_id=9))
    assert config.mask_token_id == config.to_dict()["mask_token_id"] == 9


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TwoTowerConfig.from_dict(raw()).hidden_size = 1  # type: ignore[misc]


def test_missing_fields_are_named_together() -> None:
    content = raw()
    for name in ("hidden_size", "conv_kernel", "n_groups"):
        del content[name]
    with pytest.raises(ConfigError, match="lacks conv_kernel, hidden_size, n_groups"):
        TwoTowerConfig.from_dict(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10}, "9 letters but num_hidden_layers is 10"),
        ({"hybrid_override_pattern": "MEM*EMEXM"}, "unknown layer letter 'X'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 8"),
        ({"n_groups": 4}, "n_groups 4 does not divide mamba_num_heads 6"),
        ({"n_group": 3}, "n_group 3 does not divide n_routed_experts 16"),
        ({"topk_group": 5}, "topk_group 5 is greater than n_group 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is greater than the 8 experts"),
        ({"n_group": 16, "topk_group": 4}, "one expert per group"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"hidden_size": "96"}, "hidden_size '96' is of the wrong type"),
        ({"conv_kernel": True}, "conv_kernel True is of the wrong type"),
        ({"norm_topk_prob": 1}, "norm_topk_prob 1 is of the wrong type"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06 but layer_norm_epsilon is 1e-05"),
        ({"norm_eps": 0.0, "layer_norm_epsilon": 0.0}, "norm_eps 0.0"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_bias": True}, "use_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        ({"time_step_limit": [0.001, float("inf")]}, "time_step_limit"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"mask_token_id": 320}, "mask_token_id 320"),
        ({"torch_dtype": "int8"}, "torch_dtype 'int8'"),
    ],
)
def test_contradictions_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        TwoTowerConfig.from_dict(raw(**changes))


def test_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        TwoTowerConfig.from_pretrained(tmp_path)


def test_broken_json_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        TwoTowerConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block_size 0"),
        ({"steps_per_block": 1.5}, "steps_per_block 1.5"),
        ({"confidence_threshold": 80}, "confidence_threshold 80"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"mask_token_id": -1}, "mask_token_id -1"),
    ],
)
def test_diffusion_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DiffusionConfig(**changes)
