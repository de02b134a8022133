"""Reading, refusing and writing of configurations, with real config.json files wherever possible."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from tests.support.builders import tiny_config
from tests.support.golden_files import NAMES, checkpoint
from twotower_spec import ArgumentError, ConfigError, DiffusionConfig, TwoTowerConfig

REQUIRED = [
    "conv_kernel",
    "head_dim",
    "hidden_size",
    "hybrid_override_pattern",
    "mamba_head_dim",
    "mamba_num_heads",
    "n_groups",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "ssm_state_size",
    "vocab_size",
]


def raw_config(name: str = "T2") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint(name) / "config.json").read_text())
    return content


def write_config(directory: Path, text: str) -> Path:
    (directory / "config.json").write_text(text)
    return directory


def test_fields_of_t1_are_read() -> None:
    config = TwoTowerConfig.from_pretrained(checkpoint("T1"))
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (64, 256, 10)
    assert config.layer_kinds == "MEM*EMEM*E"
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.mamba_num_heads, config.mamba_head_dim, config.n_groups) == (4, 16, 1)
    assert (config.n_routed_experts, config.num_experts_per_tok, config.routed_scaling_factor) == (8, 2, 1.0)
    assert config.dtype == torch.float32


def test_fields_of_t2_are_read() -> None:
    config = TwoTowerConfig.from_pretrained(checkpoint("T2"))
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (96, 320, 9)
    assert (config.n_group, config.topk_group, config.routed_scaling_factor) == (4, 2, 2.5)
    assert config.moe_shared_expert_intermediate_size == 72
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert config.dtype == torch.bfloat16


def test_derived_sizes_of_t2_follow_from_its_fields() -> None:
    config = TwoTowerConfig.from_pretrained(checkpoint("T2"))
    assert config.mamba_layers == (0, 2, 5, 8)
    assert config.attention_layers == (3, 7)
    assert (config.d_inner, config.d_conv_channels) == (6 * 24, 6 * 24 + 2 * 3 * 20)


def test_a_relative_directory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint("T1").parent)
    assert TwoTowerConfig.from_pretrained("ckpt").vocab_size == 256


def test_bare_infinity_of_the_published_file_is_accepted_and_written_back() -> None:
    assert "Infinity" in (checkpoint("T2") / "config.json").read_text()
    config = TwoTowerConfig.from_pretrained(checkpoint("T2"))
    assert config.to_dict()["time_step_limit"] == [0.0, float("inf")]
    assert "Infinity" in config.to_json()


def test_infinity_as_newer_transformers_write_it_is_accepted() -> None:
    raw = {**raw_config(), "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert TwoTowerConfig.from_dict(raw).to_dict()["time_step_limit"] == raw["time_step_limit"]


@pytest.mark.parametrize("name", NAMES)
def test_written_config_equals_the_one_that_was_read(name: str) -> None:
    assert json.loads(TwoTowerConfig.from_pretrained(checkpoint(name)).to_json()) == raw_config(name)


def test_unknown_fields_are_kept_and_written_back() -> None:
    extra = {"a_later_field": {"nested": [1, None, "x"]}, "rope_theta": 17}
    config = TwoTowerConfig.from_dict({**raw_config(), **extra})
    assert config.unknown_fields["a_later_field"] == extra["a_later_field"]
    assert {name: config.to_dict()[name] for name in extra} == extra


def test_dtype_under_its_newer_name_is_read_and_written_back_under_it() -> None:
    raw = raw_config()
    raw["dtype"] = raw.pop("torch_dtype")
    config = TwoTowerConfig.from_dict(raw)
    assert config.dtype == torch.bfloat16
    assert config.to_dict() == raw


def test_both_names_of_the_dtype_may_agree() -> None:
    assert TwoTowerConfig.from_dict({**raw_config(), "dtype": "bfloat16"}).dtype == torch.bfloat16


def test_epsilon_is_read_from_either_name() -> None:
    raw = {**raw_config(), "layer_norm_epsilon": 3e-6}
    del raw["norm_eps"]
    assert TwoTowerConfig.from_dict(raw).norm_eps == 3e-6


def test_several_end_tokens_stay_a_list_in_the_file() -> None:
    config = TwoTowerConfig.from_dict({**raw_config(), "eos_token_id": [2, 11, 17]})
    assert config.eos_token_id == (2, 11, 17)
    assert config.to_dict()["eos_token_id"] == [2, 11, 17]


def test_mask_token_id_is_3_where_the_file_does_not_say_and_is_not_added_to_it() -> None:
    config = TwoTowerConfig.from_dict(raw_config())
    assert config.mask_token_id == 3
    assert "mask_token_id" not in config.to_dict()


def test_another_mask_token_id_is_written() -> None:
    assert TwoTowerConfig.from_dict(raw_config()).replace(mask_token_id=319).to_dict()["mask_token_id"] == 319


def test_config_is_frozen() -> None:
    config = TwoTowerConfig.from_dict(raw_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 7  # type: ignore[misc]


def test_replace_validates_again() -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers is 8"):
        TwoTowerConfig.from_dict(raw_config()).replace(num_hidden_layers=8)


def test_epsilon_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="norm_eps nan"):
        TwoTowerConfig.from_dict(raw_config()).replace(norm_eps=float("nan"))


def test_missing_fields_are_all_named_together() -> None:
    raw = {name: value for name, value in raw_config().items() if name not in REQUIRED}
    with pytest.raises(ConfigError) as caught:
        TwoTowerConfig.from_dict(raw)
    assert ", ".join(REQUIRED) in str(caught.value)


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("pattern length", {"num_hidden_layers": 11}, ["hybrid_override_pattern has 9", "num_hidden_layers is 11"]),
    ("unknown letter", {"hybrid_override_pattern": "MEM*EMx*M"}, ["hybrid_override_pattern", "'x'"]),
    ("heads per kv head", {"num_key_value_heads": 3}, ["num_key_value_heads 3", "num_attention_heads 8"]),
    ("heads per group", {"n_groups": 4}, ["n_groups 4", "mamba_num_heads 6"]),
    ("experts per group", {"n_group": 3}, ["n_group 3", "n_routed_experts 16"]),
    ("top-k above eligible", {"num_experts_per_tok": 9}, ["num_experts_per_tok 9", "8 experts"]),
    ("more groups kept than there are", {"topk_group": 5}, ["topk_group 5", "n_group 4"]),
    ("one expert per group", {"n_group": 16, "topk_group": 16}, ["n_group 16", "n_routed_experts 16"]),
    ("no layers", {"hybrid_override_pattern": "", "num_hidden_layers": 0}, ["num_hidden_layers 0"]),
    ("zero heads", {"mamba_num_heads": 0}, ["mamba_num_heads 0"]),
    ("negative width", {"hidden_size": -96}, ["hidden_size -96"]),
    ("dense layer without width", {"hybrid_override_pattern": "MEM*EM-*M", "intermediate_size": 0}, ["intermediate_"]),
    ("epsilon of zero", {"norm_eps": 0.0, "layer_norm_epsilon": 0.0}, ["norm_eps 0.0"]),
    ("text for int", {"vocab_size": "320"}, ["vocab_size '320'", "int"]),
    ("float for int", {"head_dim": 20.0}, ["head_dim 20.0", "int"]),
    ("bool for int", {"conv_kernel": True}, ["conv_kernel True", "int"]),
    ("null for int", {"n_groups": None}, ["n_groups None", "int"]),
    ("bool for float", {"routed_scaling_factor": True}, ["routed_scaling_factor True", "float"]),
    ("int for bool", {"use_conv_bias": 1}, ["use_conv_bias 1", "bool"]),
    ("list for text", {"hybrid_override_pattern": ["M", "E"]}, ["hybrid_override_pattern ['M', 'E']", "str"]),
    ("text for a token id", {"eos_token_id": "</s>"}, ["eos_token_id '</s>'"]),
    ("text among token ids", {"eos_token_id": [2, "x"]}, ["eos_token_id", "'x'"]),
    ("bool for a token id", {"pad_token_id": False}, ["pad_token_id False"]),
    ("two epsilons", {"layer_norm_epsilon": 1e-6}, ["norm_eps is 1e-05", "layer_norm_epsilon is 1e-06"]),
    ("two dtypes", {"dtype": "float32"}, ["torch_dtype is 'bfloat16'", "dtype is 'float32'"]),
    ("attention bias", {"attention_bias": True}, ["attention_bias True"]),
    ("mlp bias", {"mlp_bias": True}, ["mlp_bias True"]),
    ("mamba bias", {"use_bias": True}, ["use_bias True"]),
    ("projection bias", {"mamba_proj_bias": True}, ["mamba_proj_bias True"]),
    ("tied embeddings", {"tie_word_embeddings": True}, ["tie_word_embeddings True"]),
    ("another activation", {"mlp_hidden_act": "gelu"}, ["mlp_hidden_act 'gelu'"]),
    ("quantised", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8"]),
    ("another architecture", {"architectures": ["NemotronHForCausalLM"]}, ["NemotronHForCausalLM", "TwoTower"]),
    ("architectures of the wrong type", {"architectures": 7}, ["architectures 7"]),
    ("finite time step", {"time_step_limit": [0.0, 0.1]}, ["time_step_limit [0.0, 0.1]"]),
    ("time step from above zero", {"time_step_limit": [1e-4, float("inf")]}, ["time_step_limit [0.0001, inf]"]),
    ("time step of text", {"time_step_limit": ["a", float("inf")]}, ["time_step_limit ['a', inf]"]),
    ("time step of one number", {"time_step_limit": 0.1}, ["time_step_limit 0.1"]),
    ("unknown dtype", {"torch_dtype": "float8_e4m3fn"}, ["torch_dtype 'float8_e4m3fn'", "bfloat16"]),
    ("dtype of the wrong type", {"torch_dtype": ["bfloat16"]}, ["torch_dtype ['bfloat16']"]),
    ("mask outside the vocabulary", {"mask_token_id": 320}, ["mask_token_id 320", "319"]),
    ("negative mask", {"mask_token_id": -1}, ["mask_token_id -1"]),
]


@pytest.mark.parametrize(("changes", "named"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refusal_names_field_and_value(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TwoTowerConfig.from_dict({**raw_config(), **changes})
    assert [text for text in named if text not in str(caught.value)] == []


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        TwoTowerConfig.from_pretrained(tmp_path)


def test_path_that_is_no_directory_and_no_hub_id_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'/no/such/place'"):
        TwoTowerConfig.from_pretrained("/no/such/place")


def test_hub_id_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'nobody/nothing-17'"):
        TwoTowerConfig.from_pretrained("nobody/nothing-17")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "7", "null", '{"vocab_size": 1,}'])
def test_config_file_that_holds_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        TwoTowerConfig.from_pretrained(write_config(tmp_path, text))


def test_config_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(ConfigError, match=r"config\.json"):
        TwoTowerConfig.from_pretrained(tmp_path)


def test_kv_bytes_count_keys_and_values_of_the_attention_layers() -> None:
    config = TwoTowerConfig.from_pretrained(checkpoint("T2"))
    assert config.kv_bytes_per_token(torch.bfloat16) == 2 * 2 * 2 * 20 * 2


@pytest.mark.parametrize(("dtype", "conv_size", "ssm_size"), [("bfloat16", 2, 4), ("float64", 8, 8)])
def test_mamba_bytes_keep_the_ssm_state_in_float32_at_least(dtype: str, conv_size: int, ssm_size: int) -> None:
    config = TwoTowerConfig.from_pretrained(checkpoint("T2"))
    per_layer = 264 * 3 * conv_size + 144 * 20 * ssm_size
    assert config.mamba_bytes_per_request(getattr(torch, dtype)) == 4 * per_layer


def test_tokens_may_visit_fewer_experts_than_the_checkpoint_says() -> None:
    config = tiny_config(num_experts_per_tok=3)
    assert config.with_experts_per_token(None) is config
    assert config.with_experts_per_token(2) == config.replace(num_experts_per_tok=2)
    for value in (0, 4, True, 1.0):
        with pytest.raises(ArgumentError, match=f"experts_per_token {value} is not allowed; give an integer from 1 to"):
            config.with_experts_per_token(value)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="experts_per_token 1 is not allowed, the model has no experts"):
        tiny_config(hybrid_override_pattern="M*-").with_experts_per_token(1)


def test_diffusion_defaults_are_the_published_ones() -> None:
    config = DiffusionConfig()
    assert (config.block_size, config.steps_per_block, config.confidence_threshold) == (16, 16, 0.9)
    assert (config.temperature, config.top_k, config.top_p, config.mask_token_id) == (0.0, None, None, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", 0),
        ("block_size", -16),
        ("block_size", 16.0),
        ("block_size", True),
        ("steps_per_block", 0),
        ("steps_per_block", "16"),
        ("mask_token_id", -1),
        ("mask_token_id", None),
        ("confidence_threshold", 3),
        ("confidence_threshold", -0.1),
        ("confidence_threshold", float("nan")),
        ("confidence_threshold", "0.9"),
        ("temperature", -1.0),
        ("temperature", float("inf")),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
    ],
)
def test_diffusion_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        DiffusionConfig(**{name: value})
    assert f"{name} {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", 1),
        ("steps_per_block", 1),
        ("confidence_threshold", 0),
        ("confidence_threshold", 1.0),
        ("top_k", 0),
        ("top_p", 1),
        ("mask_token_id", 0),
        ("temperature", 0),
    ],
)
def test_diffusion_value_at_its_limit_is_allowed(name: str, value: Any) -> None:
    assert getattr(DiffusionConfig(**{name: value}), name) == value


def test_diffusion_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiffusionConfig().block_size = 8  # type: ignore[misc]
