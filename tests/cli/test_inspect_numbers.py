"""Memory that `inspect` estimates, against the formulas of the configuration; and arguments that it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.files import change_shard, copy_checkpoint
from tests.support.command_line import Command
from tests.support.golden_files import NAMES, checkpoint, golden_model
from twotower_spec import TwoTowerConfig, TwoTowerModel


def memory(command: Command, name: str, *args: object) -> dict[str, Any]:
    code, out, err = command("inspect", checkpoint(name), "--json", *args)
    assert (code, err) == (0, "")
    content: dict[str, Any] = json.loads(out)["memory"]
    return content


@pytest.mark.parametrize("name", NAMES)
def test_each_request_adds_the_same_bytes_on_both_devices(name: str, command: Command) -> None:
    sizes = [memory(command, name, "--num-requests", count) for count in (0, 1, 17)]
    for device, weights, each in [
        ("context_device", "context_weights", "state_per_request"),
        ("denoiser_device", "denoiser_weights", "block_context_per_request"),
    ]:
        assert [m[device] - m[weights] for m in sizes] == [0, sizes[0][each], 17 * sizes[0][each]]


@pytest.mark.parametrize("name", NAMES)
def test_each_token_adds_its_keys_and_values_and_nothing_else(name: str, command: Command) -> None:
    config = TwoTowerConfig.from_pretrained(checkpoint(name))
    assert config.dtype is not None
    sizes = [memory(command, name, "--context-length", length) for length in (0, 1, 1001)]
    state = [m["state_per_request"] for m in sizes]
    mamba, per_token = config.mamba_bytes_per_request(config.dtype), config.kv_bytes_per_token(config.dtype)
    assert state == [mamba, mamba + per_token, mamba + 1001 * per_token]
    assert [m["block_context_per_request"] - m["state_per_request"] for m in sizes] == [16 * per_token] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_weights_are_those_of_a_model_loaded_in_that_dtype(dtype: str, command: Command) -> None:
    found, model = memory(command, "T2", "--dtype", dtype), golden_model("T2", dtype)
    assert found["dtype"] == dtype
    assert found["context_weights"] == sum(p.nbytes for p in model.context.parameters())
    assert found["denoiser_weights"] == sum(p.nbytes for p in model.denoiser.parameters())


@pytest.mark.parametrize("experts_dtype", ["float8_e4m3fn", "int8"])
def test_quantised_experts_are_those_of_a_model_loaded_with_them(
    experts_dtype: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = memory(command, "T2", "--experts-dtype", experts_dtype)
    model = TwoTowerModel.from_pretrained(checkpoint("T2"), experts_dtype=experts_dtype)
    assert (found["dtype"], found["experts_dtype"]) == ("bfloat16", experts_dtype)
    assert found["denoiser_weights"] == sum(p.nbytes for p in model.denoiser.parameters())
    monkeypatch.setenv("COLUMNS", "160")
    out = command("inspect", checkpoint("T2"), "--experts-dtype", experts_dtype)[1]
    assert f"memory in bfloat16, experts in {experts_dtype}" in out


def test_stored_bytes_and_dtypes_are_those_of_the_files(command: Command) -> None:
    parts = json.loads(command("inspect", checkpoint("T2"), "--json")[1])["parts"]
    stored = sum(path.stat().st_size for path in checkpoint("T2").glob("*.safetensors"))
    assert 0.95 * stored < sum(part["num_bytes"] for part in parts.values()) < stored  # the rest are headers
    assert all(part["dtypes"].keys() == {"bfloat16", "float32"} for part in parts.values())


def test_missing_unexpected_and_misshaped_tensors_are_all_problems(command: Command, tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    changes = {"lm_head__weight": None, "context_lm_head__weight": torch.zeros(7, 64), "visual__weight": torch.ones(3)}
    change_shard(directory / "model.safetensors", **changes)
    code, out, _ = command("inspect", directory, "--json")
    found = json.loads(out)
    assert code == 2
    assert sorted(problem.split(" ")[0] + " " + problem.split(" ")[1] for problem in found["problems"]) == [
        "misshaped: context_lm_head.weight",
        "missing: lm_head.weight",
        "unexpected: visual.weight",
    ]
    assert found["parts"]["other"]["num_tensors"] == 1


@pytest.mark.parametrize("text", ["", "[1]", "{}"])
def test_broken_config_is_a_problem_and_tensors_are_shown_all_the_same(
    text: str, command: Command, tmp_path: Path
) -> None:
    directory = copy_checkpoint("T2", tmp_path)
    (directory / "config.json").write_text(text)
    code, out, _ = command("inspect", directory, "--json")
    found = json.loads(out)
    assert code == 2
    assert (found["config"], found["memory"]) == (None, None)
    assert len(found["problems"]) == 1 and "config.json" in found["problems"][0]
    assert found["parts"]["context"]["num_tensors"] > 17


def test_json_output_is_strict_json(command: Command) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(command("inspect", checkpoint("T2"), "--json")[1], parse_constant=refuse)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--num-requests", "-1"], "--num-requests -1"),
        (["--context-length", "-17"], "--context-length -17"),
        (["--dtype", "int4"], "dtype 'int4'"),
    ],
)
def test_bad_option_is_one_sentence(args: list[str], named: str, command: Command) -> None:
    code, out, err = command("inspect", checkpoint("T1"), *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and named in err and err.count("\n") == 1
