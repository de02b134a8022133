"""End tokens are those of vLLM, wherever a checkpoint names them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.files import copy_checkpoint
from tests.support.command_line import Command
from twotower_spec import ConfigError, TwoTowerModel
from twotower_spec.checkpoint import end_token_ids, load_tokenizer
from twotower_spec.demo import trio_path

ABSENT = object()
# eos_token_id of config.json and of generation_config.json (None: there is no such file), and what is expected beside
# the tokenizer's 2.
CASES: dict[str, tuple[Any, Any, set[int]]] = {
    "a number in config.json": (7, None, {7}),
    "a list in config.json": ([2, 7, 11], None, {7, 11}),
    "none in config.json": (None, None, set()),
    "not in config.json": (ABSENT, None, set()),
    "a number in generation_config.json": (2, 9, {9}),
    "a list in generation_config.json": (2, [9, 10], {9, 10}),
    "generation_config.json speaks for config.json": (7, [9], {9}),
    "generation_config.json without any": (7, ABSENT, set()),
}


def write(path: Path, eos: Any, **content: Any) -> None:
    path.write_text(json.dumps(content | ({} if eos is ABSENT else {"eos_token_id": eos})))


def checkpoint_with(directory: Path, config: Any, generation: Any) -> Path:
    shutil.copytree(trio_path("verifier"), directory)
    content = json.loads((directory / "config.json").read_text())
    content.pop("eos_token_id")
    write(directory / "config.json", config, **content)
    (directory / "generation_config.json").unlink()
    if generation is not None:
        write(directory / "generation_config.json", generation)
    return directory


@pytest.mark.parametrize(("config", "generation", "expected"), CASES.values(), ids=CASES.keys())
def test_end_tokens_are_those_of_vllm(config: Any, generation: Any, expected: set[int], tmp_path: Path) -> None:
    directory = checkpoint_with(tmp_path / "model", config, generation)
    assert end_token_ids(directory, load_tokenizer(directory), 2048) == sorted({2, *expected})
    assert end_token_ids(directory, None, 2048) == sorted(expected | ({2} & set(_listed(generation or config))))
    vllm = pytest.importorskip("vllm")
    from vllm.transformers_utils.config import try_get_generation_config

    found = try_get_generation_config(str(directory), trust_remote_code=False)
    params = vllm.SamplingParams()
    params.update_from_generation_config(found.to_diff_dict(), 2)
    assert {2, *(params.stop_token_ids or [])} == {2, *expected}


def _listed(eos: Any) -> list[Any]:
    return eos if isinstance(eos, list) else [eos]


def test_part_of_a_config_names_the_end_where_the_whole_does_not(tmp_path: Path) -> None:
    write(tmp_path / "config.json", None, text_config={"eos_token_id": [5, 6]})
    assert end_token_ids(tmp_path, None, 64) == [5, 6]


def test_ids_that_no_text_can_hold_are_left_out_and_no_ids_refused(tmp_path: Path) -> None:
    write(tmp_path / "config.json", [5, 151645, -1])
    assert end_token_ids(tmp_path, None, 64) == [5]
    for value in ("</s>", [True], {"a": 1}, [[5]]):
        write(tmp_path / "generation_config.json", value)
        with pytest.raises(ConfigError, match=r"generation_config\.json is no token id"):
            end_token_ids(tmp_path, None, 64)
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"generation_config\.json:1 is not JSON"):
        end_token_ids(tmp_path, None, 64)


@pytest.mark.parametrize("mode", ["ar", "self-speculative", "mask-diffusion"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_generate_stops_at_every_end_token_of_the_checkpoint(
    mode: str, file: str, command: Command, tmp_path: Path
) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    base = (
        "generate",
        "--model",
        directory,
        "--mode",
        mode,
        "--max-new-tokens",
        "24",
        "--json",
        "--token-ids",
        "9,4,7",
    )
    free = json.loads(command(*base, "--ignore-eos")[1])["token_ids"]
    end = free[4]
    (directory / "generation_config.json").unlink()
    content = json.loads((directory / "config.json").read_text())
    write(directory / file, [2, end], **(content if file == "config.json" else {}))
    stopped = json.loads(command(*base)[1])["token_ids"]
    first = next(i for i, token in enumerate(free) if token in (2, end))
    kept = 16 * (first // 16 + 1) if mode == "mask-diffusion" else first + 1  # a block is kept whole
    assert stopped == free[:kept] and len(stopped) < 24


CHANGES_OF_CONFIG: dict[str, dict[str, Any]] = {
    "dtype with its module": {"torch_dtype": "torch.float32"},
    "automatic dtype": {"torch_dtype": "auto"},
    "no dtype": {"torch_dtype": None},
    "both spellings of a dtype": {"torch_dtype": "torch.float32", "dtype": "float32"},
    "a spelling that says nothing": {"dtype": "auto"},
    "no quantisation": {"quantization_config": {}},
}


@pytest.mark.parametrize("changes", CHANGES_OF_CONFIG.values(), ids=CHANGES_OF_CONFIG.keys())
def test_harmless_fields_of_a_config_change_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    directory = copy_checkpoint("T1", tmp_path)
    expected = TwoTowerModel.from_pretrained(directory).generate_ar([[12, 44, 7]], 8).token_ids
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | changes))
    model = TwoTowerModel.from_pretrained(directory)
    assert model.generate_ar([[12, 44, 7]], 8).token_ids == expected
    model.save_pretrained(tmp_path / "again")
    again = TwoTowerModel.from_pretrained(tmp_path / "again")
    assert again.generate_ar([[12, 44, 7]], 8).token_ids == expected
