"""Experts of 8 or 4 bits: made while a checkpoint is read, saved, read again, refused; and the memory they save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.files import change_shard, copy_checkpoint, stored_bytes, stored_tensors
from tests.support.builders import random_ids, tiny_config
from tests.support.golden_files import NAMES, checkpoint
from tests.support.tolerances import FLOAT64
from twotower_bench.drafter_size import PUBLISHED_SIZE
from twotower_kernels.experts import quantise
from twotower_kernels.experts.quantisation import dequantise
from twotower_spec import ArgumentError, CheckpointError, ConfigError, TwoTowerConfig, TwoTowerModel
from twotower_spec.config import EXPERT_DTYPES
from twotower_spec.drafting import DraftingSession, FixedPolicy
from twotower_spec.inspection import inspect_checkpoint
from twotower_spec.towers.model import TwoTowers, towers_without_memory

WEIGHT, SCALE = "context_tower.layers.1.mixer.experts.0.up_proj.weight", "_scale"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def is_expert(name: str) -> bool:
    return ".experts." in name and name.endswith("_proj.weight")


def quantised(name: str, experts_dtype: str, dtype: str | None = None) -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(checkpoint(name), dtype=dtype, experts_dtype=experts_dtype)


def saved(parent: Path, name: str = "T1", experts_dtype: str = "int8") -> Path:
    quantised(name, experts_dtype).save_pretrained(parent / "quantised")
    return parent / "quantised"


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TwoTowerModel.from_pretrained(directory)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("experts_dtype", EXPERT_DTYPES)
def test_experts_are_quantised_while_they_are_read_and_all_else_is_as_stored(name: str, experts_dtype: str) -> None:
    loaded, stored = dict(quantised(name, experts_dtype).checkpoint_tensors()), stored_tensors(checkpoint(name))
    experts = {tensor for tensor in stored if is_expert(tensor)}
    assert experts and loaded.keys() == {*stored, *(tensor + SCALE for tensor in experts)}
    for tensor in stored:
        if tensor in experts:
            rounded, scales = quantise(stored[tensor], EXPERT_DTYPES[experts_dtype])
            assert torch.equal(bits(loaded[tensor]), bits(rounded)) and torch.equal(loaded[tensor + SCALE], scales)
        else:
            assert torch.equal(loaded[tensor], stored[tensor].to(loaded[tensor].dtype)), tensor


@pytest.mark.parametrize("experts_dtype", EXPERT_DTYPES)
def test_saved_quantised_experts_are_read_again_to_the_bit(experts_dtype: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, "T2", experts_dtype)
    assert json.loads((directory / "config.json").read_text())["experts_dtype"] == experts_dtype
    for again in (None, experts_dtype):
        model = TwoTowerModel.from_pretrained(directory, experts_dtype=again)
        assert model.config.experts_dtype == experts_dtype
        model.save_pretrained(tmp_path / "again")
        assert stored_bytes(tmp_path / "again") == stored_bytes(directory)
    assert inspect_checkpoint(directory).problems == []
    others = {name: content for name, content in stored_bytes(checkpoint("T2")).items() if not is_expert(name)}
    assert others.items() <= stored_bytes(directory).items()


@pytest.mark.parametrize("towers", ["context", "denoiser"])
def test_one_tower_of_quantised_experts_is_read_alone(towers: str, tmp_path: Path) -> None:
    model = TwoTowerModel.from_pretrained(saved(tmp_path), towers=towers)  # type: ignore[arg-type]
    assert any(name.endswith(SCALE) for name, _ in model.checkpoint_tensors())


@pytest.mark.parametrize("experts_dtype", EXPERT_DTYPES)
def test_quantised_experts_compute_what_their_numbers_times_scales_do(experts_dtype: str) -> None:
    model = quantised("T2", experts_dtype, "float64")
    plain = TwoTowers(model.config.replace(experts_dtype=None), torch.float64)
    tensors = dict(model.checkpoint_tensors())
    for name, destination in plain.checkpoint_tensors():
        scales = tensors.get(name + SCALE)
        content = tensors[name]
        destination.data.copy_(content if scales is None else dequantise(content, scales, torch.float64))
    expected = TwoTowerModel(plain.config, torch.float64)
    expected.load_state_dict(plain.state_dict())
    prompts = [random_ids(9), random_ids(4, seed=1)]
    for towers in (model, expected):
        assert towers.generate_ar(prompts, 5).token_ids == expected.generate_ar(prompts, 5).token_ids
    blocks = [one.generate_mask_diffusion(prompts, 16, block_size=8).token_ids for one in (model, expected)]
    assert blocks[0] == blocks[1]
    mixers = [one.denoiser.layers[1].mixer for one in (model, expected)]
    x = torch.linspace(-1, 1, 5 * model.config.hidden_size, dtype=torch.float64).view(5, -1)
    torch.testing.assert_close(mixers[0](x), mixers[1](x), atol=FLOAT64, rtol=FLOAT64)


def test_a_new_model_may_have_quantised_experts() -> None:
    config = tiny_config(experts_dtype="int8")
    model, wide = TwoTowerModel.from_config(config), TwoTowerModel.from_config(tiny_config())
    tensors, expected = dict(model.checkpoint_tensors()), dict(wide.checkpoint_tensors())
    for name, values in expected.items():
        rounded, scales = quantise(values, torch.int8) if is_expert(name) else (values, None)
        assert torch.equal(tensors[name], rounded)
        assert scales is None or torch.equal(tensors[name + SCALE], scales)


def test_dtypes_that_experts_are_not_quantised_to_are_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ArgumentError, match="experts_dtype 'int2' is not allowed; give one of float8_e4m3fn, int8, int4"
    ):
        quantised("T1", "int2")
    with pytest.raises(ConfigError, match="experts_dtype 'int2' is not allowed"):
        tiny_config(experts_dtype="int2")
    with pytest.raises(ConfigError, match=r"moe_intermediate_size 25 is odd.*give 'int8'"):
        tiny_config(experts_dtype="int4", moe_intermediate_size=25)
    with pytest.raises(ArgumentError, match="experts_dtype 'int8' is not allowed, the model has no experts"):
        tiny_config(hybrid_override_pattern="M*-").with_experts_dtype("int8")
    with pytest.raises(ArgumentError, match="experts are stored in int8; leave it out, or give the checkpoint that"):
        TwoTowerModel.from_pretrained(saved(tmp_path), experts_dtype="float8_e4m3fn")


@pytest.mark.parametrize("experts_dtype", EXPERT_DTYPES)
def test_quantised_experts_without_a_word_in_config_json_are_refused(experts_dtype: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, experts_dtype=experts_dtype)
    content = json.loads((directory / "config.json").read_text())
    del content["experts_dtype"]
    (directory / "config.json").write_text(json.dumps(content))
    message = refusal(directory)
    assert f"quantised: {WEIGHT} is {experts_dtype}, which experts_dtype of config.json is not" in message
    problems = inspect_checkpoint(directory).problems
    assert f"{len(problems)} tensors disagree" in message
    assert any(problem.startswith(f"unexpected: {WEIGHT}{SCALE}") for problem in problems)


def test_quantised_experts_without_their_scales_are_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    change_shard(directory / "model.safetensors", **{WEIGHT + SCALE: None})
    assert f"missing: {WEIGHT}{SCALE}" in refusal(directory)


def test_scales_of_experts_that_are_floats_are_refused(tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    width = stored_tensors(directory)[WEIGHT].shape[0]
    change_shard(directory / "model.safetensors", **{WEIGHT + SCALE: torch.ones(width)})
    for experts_dtype in (None, "int8"):
        with pytest.raises(CheckpointError, match=f"unexpected: {WEIGHT}{SCALE}"):
            TwoTowerModel.from_pretrained(directory, experts_dtype=experts_dtype)


def test_a_gpu_that_does_not_convert_float8_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ArgumentError, match=r"needs compute capability 8\.9, and cuda:0 has 8\.0; give 'int8'"):
        TwoTowerModel.from_pretrained(
            checkpoint("T1"), towers="denoiser", experts_dtype="float8_e4m3fn", denoiser_device="cuda:0"
        )


@pytest.mark.parametrize(
    ("experts_dtype", "gigabytes", "fit_into"), [("float8_e4m3fn", 67.8, 80), ("int8", 67.8, 80), ("int4", 40.1, 48)]
)
def test_memory_that_both_towers_of_the_published_model_and_eight_requests_fit_into(
    experts_dtype: str, gigabytes: float, fit_into: int
) -> None:
    config = PUBLISHED_SIZE.with_experts_dtype(experts_dtype)
    towers = towers_without_memory(config, torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in towers.parameters())
    requests = 8 * (config.mamba_bytes_per_request(torch.bfloat16) + 2048 * config.kv_bytes_per_token(torch.bfloat16))
    assert round(weights / 1e9, 1) == gigabytes and round(requests / 1e9, 1) == 0.5
    assert weights + requests < fit_into * 1e9
    wide = towers_without_memory(PUBLISHED_SIZE, torch.bfloat16)
    assert sum(parameter.nbytes for parameter in wide.parameters()) > 126e9


def test_a_session_says_the_bytes_that_quantised_experts_take(tmp_path: Path) -> None:
    model = TwoTowerModel.from_pretrained(saved(tmp_path))
    held = DraftingSession(model, FixedPolicy(4, 1)).memory()
    estimate = inspect_checkpoint(checkpoint("T1"), experts_dtype="int8").memory
    assert estimate is not None and estimate.experts_dtype == "int8"
    assert held.context_tower_bytes == estimate.context_weights
    assert held.denoiser_tower_bytes == estimate.denoiser_weights
    wide, config = inspect_checkpoint(checkpoint("T1")).memory, model.config
    layers, hidden, width = config.layer_kinds.count("E"), config.hidden_size, config.moe_intermediate_size
    saved_bytes = layers * config.n_routed_experts * (3 * 2 * hidden * width - 4 * (hidden + width))
    assert wide is not None and wide.dtype == "float32"
    assert wide.denoiser_weights - estimate.denoiser_weights == saved_bytes


def test_a_configuration_says_how_experts_are_held_only_where_they_are_quantised() -> None:
    assert "experts_dtype" not in tiny_config().to_dict()
    content = tiny_config(experts_dtype="int8").to_dict()
    assert content["experts_dtype"] == TwoTowerConfig.from_dict(content).experts_dtype == "int8"


@pytest.mark.parametrize("experts_dtype", EXPERT_DTYPES)
def test_parameters_of_a_saved_checkpoint_are_counted_as_weights(experts_dtype: str, tmp_path: Path) -> None:
    wide, held = inspect_checkpoint(checkpoint("T1")), inspect_checkpoint(saved(tmp_path, "T1", experts_dtype))
    for part in ("context", "denoiser"):
        assert held.parts[part].num_parameters == wide.parts[part].num_parameters
